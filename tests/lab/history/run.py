"""The benchmark of historic bugs: `python tests/lab/history/run.py [--isa svm|vmx] [-o DIR] [--check] [BUG...]`.

Builds kvm's modules once per bug, swaps them within one boot of a lab host, makes each bug happen under the recorder
with its healthy twin beside it, checks here what was recorded, and writes results.json and docs/history.md.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from selftests.build import build_selftests

from history.build import build_variants
from history.evaluate import evaluate
from history.steps import steps_for
from history.table import write_results
from kvmtrace.lab import Job, LabFailedError, run_lab
from kvmtrace.lab.initramfs import find_busybox

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from history.steps import Step

HERE = Path(__file__).resolve().parent
BATCH = {"svm": 30, "vmx": 8}  # steps per boot
MEMORY_MIB = {"svm": 3072, "vmx": 2048}
LIMIT_S = 60  # of a step
MAX_SIZE = "8M"
VENDOR = {"svm": "kvm-amd", "vmx": "kvm-intel"}


def _script(isa: str, steps: Sequence[Step], folder: dict[Step, str]) -> str:
    lines = [f"limit_s={LIMIT_S} max_size={MAX_SIZE}", (HERE / "boot.sh").read_text()]
    for step in steps:
        lines.append(" ".join(["load", folder[step], VENDOR[isa], *step.parameters]))
        lines.append(" ".join(["one", step.name, *step.trigger]))
    return "\n".join(lines) + "\ntrue\n"


def _fill(work: Path, isa: str, steps: Sequence[Step], said: bool) -> dict[Step, str]:
    """Put programs and modules into the lab's directory; return where the modules of each step are."""
    for source, options in ((HERE / "trigger.c", []), (HERE.parent / "unusual" / "unusual.c", ["-pthread"])):
        command = ["cc", "-static", "-O1", *options, "-o", str(work / source.stem), str(source)]
        subprocess.run(command, check=True)
    shutil.copy(find_busybox(), work / "busybox")
    for step in steps:
        if step.probes:
            (work / f"{step.name}.probes").write_text("".join(f"{line}\n" for line in step.probes))
    tests = {word.removeprefix("./") for step in steps for word in step.trigger if word.startswith("./")}
    programs = build_selftests("svm", "6.1").folder
    for test in tests - {"trigger", "unusual"}:
        shutil.copy(programs / test, work / test)
    built = build_variants([step.edits for step in steps], print if said else str)
    places: dict[Path, str] = {}
    for modules in built.values():
        name = places.setdefault(modules, f"modules-{len(places)}")
        (work / name).mkdir(exist_ok=True)
        for module in ("kvm.ko", f"{VENDOR[isa]}.ko"):
            if not (work / name / module).exists():
                shutil.copy(modules / module, work / name)
    return {step: places[built[step.edits]] for step in steps}


def record(isa: str, steps: Sequence[Step], out: Path, *, said: bool = False) -> None:
    """Record steps in one boot; NAME.dat, .log, .status and .dmesg of each that was reached come into `out`."""
    with tempfile.TemporaryDirectory(prefix="history-") as folder:
        work = Path(folder)
        where = _fill(work, isa, steps, said)
        (work / "job.sh").write_text(_script(isa, steps, where))
        job = Job(isa, ("sh", "./job.sh"), cwd=work, out=out, timeout_s=1500, memory_mib=MEMORY_MIB[isa])
        try:
            run_lab(job)
        except LabFailedError as problem:  # what was complete has been brought out
            print(problem)


def record_all(isa: str, out: Path, names: Iterable[str] = (), *, most: int = 99, said: bool = False) -> None:
    """Record every step of an ISA that `out` does not have yet, in as few boots as that takes, `most` at most."""
    out.mkdir(parents=True, exist_ok=True)
    boots = 0
    while boots < most:
        missing = [step for step in steps_for(isa, names) if not (out / f"{step.name}.status").exists()]
        if not missing:
            return
        batch = missing[: BATCH[isa]]
        if said:
            print(f"{isa}: boot {boots + 1}, {len(batch)} of {len(missing)} recordings", flush=True)
        record(isa, batch, out, said=said)
        boots += 1
        if not (out / f"{batch[0].name}.status").exists():  # it took the host along
            (out / f"{batch[0].name}.status").write_text("lost\n")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=("svm", "vmx"), action="append")
    parser.add_argument("-o", dest="out", type=Path, default=Path("history-results"))
    parser.add_argument("--check", action="store_true", help="only check what DIR holds")
    parser.add_argument("--build", action="store_true", help="only build")
    parser.add_argument("--boots", type=int, default=99, help="of each lab at most; the next call goes on")
    parser.add_argument("bugs", nargs="*")
    options = parser.parse_args()
    isas = options.isa or ["svm", "vmx"]
    for isa in isas:
        if options.build:
            build_variants([step.edits for step in steps_for(isa, options.bugs)], print)
        elif not options.check:
            record_all(isa, options.out / isa, options.bugs, most=options.boots, said=True)
    if not options.build:
        write_results(evaluate(isas, options.out, options.bugs))


if __name__ == "__main__":
    main()
