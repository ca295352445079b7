"""The compiled loops alone, in one process, by libFuzzer (loops_target.c): many thousand executions a second."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fuzz.own_build import PACKAGE

TARGET = Path(__file__).parent / "loops_target.c"
FLAGS = (
    "-O1",
    "-g",
    "-ffp-contract=off",
    "-fsanitize=fuzzer,address,undefined",
    "-fno-sanitize-recover=undefined",
)
_PROGRESS = re.compile(r"^#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+)", re.MULTILINE)
_OF = re.compile(r"INFO: Loaded 1 modules\s+\((\d+) inline 8-bit counters\)")


@dataclass(frozen=True)
class LoopsRun:
    """What libFuzzer's log says."""

    executions: int
    edges: int
    of_edges: int
    features: int
    crashes: tuple[str, ...]

    def __str__(self) -> str:
        """Return a line for people."""
        return (
            f"compiled loops alone (libFuzzer): {self.executions:,} executions; edges: {self.edges:,} of "
            f"{self.of_edges:,}; features: {self.features:,}; crashes: {', '.join(self.crashes) or 'none'}"
        )


def build_target(folder: Path, change: tuple[str, str, str] | None = None) -> Path:
    """Compile the loops and their target with clang.

    Parameters
    ----------
    change : file, text in it, what stands there instead
    """
    sources = []
    for source in sorted((PACKAGE / "_native").glob("*.c")):
        text = source.read_text()
        if change is not None and source.name == change[0]:
            assert change[1] in text
            text = text.replace(change[1], change[2])
        sources.append(folder / source.name)
        sources[-1].write_text(text)
    program = folder / "loops_target"
    command = ["clang", *FLAGS, f"-I{PACKAGE / '_native'}", str(TARGET), *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def start_target(program: Path, keep: Path, *options: str) -> subprocess.Popen[bytes]:
    """Run a target; its log and inputs go to `keep`/.loops, inputs that broke it to `keep`."""
    corpus = keep / ".loops"
    corpus.mkdir(exist_ok=True)
    # of the time on the wall: a machine that is very busy stands still for a while
    limits = ("-max_len=4096", "-len_control=0", "-rss_limit_mb=2048", "-timeout=300", "-print_final_stats=1")
    command = [str(program), *limits, *options, f"-artifact_prefix={keep}/loops-", str(corpus)]
    with (keep / ".loops.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def result_of(keep: Path) -> LoopsRun:
    """Return what a run that has ended did."""
    log = (keep / ".loops.log").read_text("utf-8", "replace")
    rows = _PROGRESS.findall(log)
    number, edges, features = (int(value) for value in rows[-1]) if rows else (0, 0, 0)
    found = _OF.search(log)
    crashes = tuple(sorted(path.name for path in keep.glob("loops-*")))
    return LoopsRun(number, edges, int(found[1]) if found else 0, features, crashes)
