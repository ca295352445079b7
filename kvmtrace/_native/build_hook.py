"""Hatchling's build hook: compiles kernel.c where there is a C compiler.

Without one kvmtrace is installed all the same; the decoders then use their NumPy code, which gives the same results.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("kvmtrace/_native/kernel.c")
LIBRARY = SOURCE.with_name("_kernel.so")
FLAGS = ("-std=c11", "-O3", "-Wall", "-Wextra", "-fPIC", "-shared", "-s")


class KernelBuildHook(BuildHookInterface):
    """Puts the compiled kernel beside its source (editable) and into the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless this is a source distribution."""
        del version
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        compiler = shlex.split(os.environ.get("CC", "cc"))
        (root / LIBRARY).unlink(missing_ok=True)
        if shutil.which(compiler[0]) is None:
            self.app.display_warning(f"no C compiler ({compiler[0]}): kvmtrace will decode with NumPy alone, slower")
            return
        done = subprocess.run(
            [*compiler, *FLAGS, "-o", str(root / LIBRARY), str(root / SOURCE)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            self.app.display_warning(f"kernel.c could not be compiled, kvmtrace will be slower: {done.stderr.strip()}")
            return
        build_data["artifacts"].append(str(LIBRARY))
        build_data["pure_python"] = False
        build_data["infer_tag"] = False
        build_data["tag"] = f"py3-none-{_platform()}"


def _platform() -> str:
    import sysconfig

    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
