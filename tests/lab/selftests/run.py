"""Runs KVM's selftests in a lab, one by one, each recorded by kvmtrace and compared with the model.

`python tests/lab/selftests/run.py --isa svm --kernel 6.1 -o DIR [TEST...]` prints a table; `--mode` is arm64's.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvmtrace.lab import Job, LabFailedError, run_lab
from selftests.build import build_selftests
from selftests.plan import ARGUMENTS, split

if TYPE_CHECKING:
    from collections.abc import Sequence

# programs of the kernel's own test suites say so: tools/testing/selftests/kselftest.h
PASSED, SKIPPED = 0, 4
LIMIT_S = {"svm": 60, "vmx": 60, "arm64": 200}  # a test's own; `timeout` reports 124
TIMED_OUT = (124, 137, 143)  # the last is busybox's
MAX_SIZE = "24M"
MEMORY_MIB = {"svm": 3072, "vmx": 2048, "arm64": 2048}  # Bochs has no more
BATCH = {"svm": 16, "vmx": 16, "arm64": 8}  # tests per boot: files come back at its end only
BOOT_LIMIT_S = {"svm": 900, "vmx": 900, "arm64": 1500}
_LOOP = """
one() {{
    name=$1; shift
    kvmtrace record --backend ftrace --events all --max-size {size} -o $name.dat -- \\
        sh -c 'name=$1; shift; timeout -k 3 {limit} "$@" >$name.log 2>&1; echo $? >$name.status' sh $name "$@" \\
        >>$name.recorder 2>&1
}}
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one test.

    Parameters
    ----------
    name : str
    status : int, its exit code; None if the lab host did not get so far
    said : str, its last line
    recording : Path, None if there is none
    """

    name: str
    status: int | None
    said: str
    recording: Path | None

    @property
    def word(self) -> str:
        """Return the outcome in a word, as kselftest has it."""
        if self.status is None:
            return "lost"
        known = {PASSED: "passed", SKIPPED: "skipped", **dict.fromkeys(TIMED_OUT, "timed out")}
        return known.get(self.status, f"failed ({self.status})")


def _script(isa: str, folder: str, tests: Sequence[str]) -> str:
    lines = [shlex.join(["one", test, f"{folder}/{test}", *ARGUMENTS.get((isa, test), ())]) for test in tests]
    return _LOOP.format(size=MAX_SIZE, limit=LIMIT_S[isa]) + "\n".join(lines) + "\ntrue\n"


def _outcome(name: str, out: Path) -> Outcome:
    status, log, recording = (out / f"{name}.{suffix}" for suffix in ("status", "log", "dat"))
    text = status.read_text().strip() if status.exists() else ""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return Outcome(name, int(text) if text else None, lines[-1][:120] if lines else "",
                   recording if recording.exists() else None)  # fmt: skip


def run_batch(isa: str, kernel: str, tests: Sequence[str], out: Path, *, mode: str | None = None) -> list[Outcome]:
    """Run tests in one boot of a lab host; NAME.dat and NAME.log come into `out`.

    A test that takes the host with it takes its batch's results along: each is then "lost".
    """
    programs = build_selftests(isa, kernel).folder
    with tempfile.TemporaryDirectory(prefix="selftests-") as work:
        if isa != "svm":  # the SVM host shares this machine's files, others get a copy of their directory
            for test in tests:
                shutil.copy(programs / test, work)
        folder = str(programs) if isa == "svm" else "."
        command = ("sh", "-c", _script(isa, folder, tests))
        job = Job(isa, command, kernel, cwd=Path(work), out=out, mode=mode,
                  timeout_s=BOOT_LIMIT_S[isa], memory_mib=MEMORY_MIB[isa])  # fmt: skip
        try:
            run_lab(job)
        except LabFailedError as problem:
            return [Outcome(test, None, " ".join(str(problem).split())[:300], None) for test in tests]
    return [_outcome(test, out) for test in tests]


def run_selftests(
    isa: str, kernel: str, out: Path, names: Sequence[str] = (), *, mode: str | None = None
) -> list[Outcome]:
    """Run all tests of the plan (or those named), in batches."""
    tests, _ = split(isa, build_selftests(isa, kernel).built)
    tests = [test for test in tests if not names or test in names]
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for start in range(0, len(tests), BATCH[isa]):
        outcomes += run_batch(isa, kernel, tests[start : start + BATCH[isa]], out, mode=mode)
    return outcomes


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=("svm", "vmx", "arm64"), default="svm")
    parser.add_argument("--kernel", choices=("6.1", "6.12", "7"), default="6.1")
    parser.add_argument("--mode", choices=("vhe", "nvhe"))
    parser.add_argument("-o", dest="out", type=Path, required=True)
    parser.add_argument("tests", nargs="*")
    options = parser.parse_args()
    for outcome in run_selftests(options.isa, options.kernel, options.out, options.tests, mode=options.mode):
        print(f"{outcome.name:40} {outcome.word:12} {outcome.said}", flush=True)


if __name__ == "__main__":
    main()
