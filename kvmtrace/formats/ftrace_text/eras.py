"""Which kernel, and which tool, printed a text, as far as its lines tell; and what they mean therefore.

A text carries no format descriptions. Where the same words mean different things, only evidence counts: without it
the value is not told.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from kvmtrace.isa.printed import OLD_NAMES, exit_reason_number
from kvmtrace.isa.registry import BY_NUMBER, PRINTED
from kvmtrace.kvm.vectors import EXCEPTION_NAMES, EXCEPTIONS_WITH_ERROR_CODE
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    Texts = Mapping[str, str | None]

_VECTORS = {name: vector for vector, name in EXCEPTION_NAMES.items()}


@dataclass
class Era:
    """What is known of the kernel and tool behind a text.

    Parameters
    ----------
    of_trace_cmd : printed by trace-cmd or perf, which do not show the errno of kvm_userspace_exit
    old_names : exit reasons are those of 2.6.31
    before_5_7 : kvm_entry without rip
    since_5_19 : kvm_inj_virq or kvm_page_fault as they are printed since then
    always_prints_error_code : kvm_inj_exception prints (0x0) where there is none, as until 5.18
    interrupts_in_info2 : kvm_exit's info2 has told the vector of the host's interrupt, as until 5.9
    short_error_code : kvm_page_fault prints 32 bits of its error_code, as until 5.18
    tells_errno : the errno of a kvm_userspace_exit is told somewhere
    isas : numbers of the ISAs whose exit reasons were met
    """

    of_trace_cmd: bool = False
    old_names: bool = False
    before_5_7: bool = False
    since_5_19: bool = False
    always_prints_error_code: bool = False
    interrupts_in_info2: bool = False
    short_error_code: bool = False

    def note(self, event: str, groups: Texts) -> None:
        """Take in the text of an event."""
        note = _NOTES.get(event)
        if note is not None:
            note(self, groups)

    tells_errno: bool = False
    isas: set[int] = field(default_factory=set)

    @property
    def info2_was_intr_info(self) -> bool | None:
        """Whether kvm_exit's info2 is what is called intr_info since 5.10, where an ISA has both; None: unknown."""
        if self.since_5_19:
            return False
        return True if self.before_5_7 or self.interrupts_in_info2 else None

    @property
    def info2_is_always_reread(self) -> bool:
        """Whether every ISA of the text is one whose info2 changed its meaning."""
        return all(number in BY_NUMBER and BY_NUMBER[number].vectoring_field == "info2" for number in self.isas)

    def only_isa(self, exit_reason: int | None) -> int:
        """Return the ISA of a reason that is printed as a number, told by the other lines; 0 where they do not."""
        told = self.isas - {0}
        return told.pop() if len(told) == 1 and exit_reason is not None and exit_reason not in PRINTED else 0

    def errno_of(self, reason: int) -> int | None:
        """Return the errno of a kvm_userspace_exit that is printed with a reason."""
        # trace-cmd prints KVM_EXIT_UNKNOWN (0) for -EINTR, too
        return None if self.of_trace_cmd or reason == 0 else 0


def _note_entry(era: Era, groups: Texts) -> None:
    era.before_5_7 |= groups.get("rip") is None
    era.since_5_19 |= groups.get("intr_info") is not None


def _note_exit(era: Era, groups: Texts) -> None:
    reason = groups.get("exit_reason")
    if reason is None:  # an architecture whose VM-exits have no reason of this kind
        return
    era.old_names |= reason in OLD_NAMES
    number, exit_reason = exit_reason_number(reason)
    if number == 0 and (groups.get("isa") or "").isdecimal():
        number = int(groups["isa"] or 0)
    era.isas.add(number)
    if groups.get("info2_hex") and number in BY_NUMBER:
        info2 = int(groups["info2_hex"] or "0", 16)
        era.interrupts_in_info2 |= BY_NUMBER[number].tells_host_interrupt(exit_reason, info2)


def _note_virq(era: Era, groups: Texts) -> None:
    era.since_5_19 |= groups.get("soft") is not None


def _note_exception(era: Era, groups: Texts) -> None:
    vector = _VECTORS.get(groups.get("exception") or "")
    if vector is not None and vector not in EXCEPTIONS_WITH_ERROR_CODE and groups.get("error_code") is not None:
        era.always_prints_error_code = True


def _note_page_fault(era: Era, groups: Texts) -> None:
    era.short_error_code |= groups.get("error_code_hex") is not None
    era.since_5_19 |= groups.get("guest_rip") is not None


def _note_userspace_exit(era: Era, groups: Texts) -> None:
    told = groups.get("outcome") in ("restart", "error") or groups.get("errno") is not None
    era.tells_errno |= told or era.errno_of(int(groups.get("number") or 0)) is not None


_NOTES = {
    "kvm_userspace_exit": _note_userspace_exit,
    "kvm_entry": _note_entry,
    "kvm_exit": _note_exit,
    "kvm_inj_virq": _note_virq,
    "kvm_inj_exception": _note_exception,
    "kvm_page_fault": _note_page_fault,
}


def reread_info2(era: Era, isa_number: int, row: Texts, values: dict[str, int | None]) -> None:
    """Say in `values` what info2 of a kvm_exit is, where the line has no intr_info beside it."""
    isa = BY_NUMBER.get(isa_number)
    if isa is None or isa.vectoring_field != "info2" or row.get("intr_info") is not None or row.get("info2") is None:
        return
    was_intr_info = era.info2_was_intr_info
    if was_intr_info is False:
        return
    values["info2"] = None
    if was_intr_info:
        values["intr_info"] = int(row["info2"] or "0", 16) & 0xFFFFFFFF


def exception_has_error(era: Era, row: Texts) -> int | None:
    """Return whether an injected exception has an error code, None where the text does not tell."""
    code = row.get("error_code")
    if not code:
        return 0
    if era.always_prints_error_code and int(code, 16) == 0:
        return 0 if _VECTORS.get(row.get("exception") or "") not in EXCEPTIONS_WITH_ERROR_CODE else None
    return 1
