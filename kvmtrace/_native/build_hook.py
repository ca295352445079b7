"""Hatchling's build hook: compiles the inner loops into the wheel, and beside their sources when installed in place.

A wheel is given the manual pages, too, made of what `--help` says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("kvmtrace/_native")
MAN = "share/man/man1"  # below sys.prefix


class LoopsBuildHook(BuildHookInterface):
    """Compiles; without a C compiler there is no kvmtrace, and the error says what to install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless this is a source distribution."""
        self.pages: Path | None = None
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / FOLDER
        sys.path.insert(0, str(folder))
        import compiling  # kvmtrace itself cannot be imported yet

        sys.path.remove(str(folder))
        try:
            library = compiling.build(folder)
        except compiling.CannotCompileError as error:
            self.app.abort(f"kvmtrace cannot be built: {error}")
        build_data["artifacts"].append(str(FOLDER / library.name))
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        if version != "editable":
            self.pages = Path(tempfile.mkdtemp(prefix="kvmtrace-man-"))
            self._write_pages(self.pages)
            build_data["shared_data"] |= {str(page): f"{MAN}/{page.name}" for page in sorted(self.pages.iterdir())}

    def _write_pages(self, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": self.root, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "kvmtrace.cli.man_pages", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            self.app.abort(f"the manual pages cannot be written: {done.stderr.strip()[-500:]}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the wheel has taken."""
        del version, build_data, artifact_path
        if self.pages is not None:
            shutil.rmtree(self.pages)
