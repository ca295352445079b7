"""The judged upstream fixes: one TOML file each in bugs/, read and checked here.

A fix that is put back has edits (our own few lines, which undo what the fix did) and a trigger; one that is left out
has the reason. Nothing of the kernel's source is kept: the edits are applied to Debian's linux-source-6.1.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.catalogue import Edit

BUGS = Path(__file__).parent / "bugs"
FOUND = ("violation", "suspicion", "invisible")
AREAS = ("vmx", "svm", "x86.c", "lapic", "ioapic", "mmu", "emulator", "nested", "pmu", "xen/hyper-v", "smm")


@dataclass(frozen=True)
class Moment:
    """The event at which the faulty code has just run: the `nth` of this name whose `field` has `value`.

    Parameters
    ----------
    event : str, as the recording names it
    field, value : which of them; field "" takes any
    nth : from 1
    """

    event: str
    field: str = ""
    value: int = 0
    nth: int = 1


@dataclass(frozen=True)
class Bug:
    """One upstream fix and what became of it here.

    Parameters
    ----------
    name : of its file
    commit : str, "" if it could not be looked up; then `where` says in which version the fix is
    subject : str, of the commit
    where : str, a version that has the fix
    area : one of AREAS
    fault : str, what went wrong without the fix
    left_out : str, why it is not put back; "" if it is
    isas : the labs that run it
    edits : what undoes the fix
    aged : edits that the healthy twin has too: they bring about a state that takes days otherwise
    functions : the faulty ones
    trigger : arguments of `kvmtrace record`; "./trigger MODE" is our own small VMM, "./NAME_test" KVM's selftest
    parameters : of modules, "kvm.force_emulation_prefix=1"
    trace : str, what a recording shows
    expect : for each ISA one of FOUND
    rules : rules that are to find it
    sign : for each ISA in which it is invisible: how it is known that the fault happened; "none: ..." if it did not
    why : str, invisible: which field of an event or which probe would show it
    probes : what is recorded beside the events: kprobes as kprobe_events takes them ("p:history/NAME FUNCTION ..."),
        tracepoints ("timer:hrtimer_start")
    probe_shows : a pattern that the text of these fits where the fault happened, and does not on the twin
    at : where the fault is in the recording, None if it cannot be told
    """

    name: str
    commit: str
    subject: str
    where: str
    area: str
    fault: str
    left_out: str = ""
    isas: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()
    aged: tuple[Edit, ...] = ()
    functions: tuple[str, ...] = ()
    trigger: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    trace: str = ""
    expect: dict[str, str] | None = None
    rules: tuple[str, ...] = ()
    sign: dict[str, str] | None = None
    why: str = ""
    probes: tuple[str, ...] = ()
    probe_shows: str = ""
    at: Moment | None = None

    def happened(self, isa: str) -> bool:
        """Say whether the guest made the fault happen in an ISA's lab, as far as it is known."""
        return not (self.sign or {}).get(isa, "").startswith("none: ")


def read_bug(path: Path) -> Bug:
    """Read one file.

    Raises
    ------
    TypeError
        It has a key that no parameter of Bug has, or lacks one that all must have.
    """
    with path.open("rb") as handle:
        told: dict[str, Any] = tomllib.load(handle)
    for key in ("edits", "aged"):
        told[key] = tuple(Edit(**edit) for edit in told.get(key, ()))
    for key in ("isas", "functions", "trigger", "parameters", "rules", "probes"):
        told[key] = tuple(told.get(key, ()))
    if "at" in told:
        told["at"] = Moment(**told["at"])
    return Bug(name=path.stem, **told)


def all_bugs() -> tuple[Bug, ...]:
    """Return all of them, by name."""
    return tuple(read_bug(path) for path in sorted(BUGS.glob("*.toml")))


def put_back(isa: str | None = None) -> tuple[Bug, ...]:
    """Return those that are put back, in an ISA's lab or in any."""
    return tuple(bug for bug in all_bugs() if bug.edits and (isa is None or isa in bug.isas))
