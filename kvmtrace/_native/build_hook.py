"""Hatchling's build hook: compiles the inner loops into the wheel, and beside their sources when installed in place."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("kvmtrace/_native")


class LoopsBuildHook(BuildHookInterface):
    """Compiles; without a C compiler there is no kvmtrace, and the error says what to install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless this is a source distribution."""
        del version
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
