"""The story of one vCPU's thread: predicted steps as they come, with the ISAs' numbers for each VM-exit."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmtrace.isa.registry import BY_NAME
from kvmtrace.isa.words import IoAccess
from kvmtrace.kvm.ioctls import KVM_RUN
from kvmtrace.predict.story import Expected, Facts, Step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.workload.listing import Line


class Story:
    """Steps of one vCPU, in order.

    Parameters
    ----------
    vcpu_id : int
    facts : Facts; an event that was not recorded is not written down
    """

    def __init__(self, vcpu_id: int, facts: Facts) -> None:
        self.vcpu_id = vcpu_id
        self.facts = facts
        self.steps: list[Step] = []
        self.in_guest = False
        self.level = 1  # of guest: 2 for a guest of the guest
        self.line: Line | None = None
        self._paths: dict[int, dict[int, None]] = {}  # index of a kvm_entry step -> RIPs that run behind it
        self._entries: list[int] = []  # the entries from which the guest may have come: the last, and those before it
        # that timing lets happen
        self._perhaps = False
        self._isa = BY_NAME.get(facts.isa)  # None: PVM
        self._run = self._isa.run_function if self._isa else ""
        self._never = self._isa.untraced | self._isa.absent if self._isa else frozenset()

    def __len__(self) -> int:
        return len(self.steps)

    def finish(self) -> tuple[Step, ...]:
        """Return the steps, each kvm_entry with its path."""
        for index, path in self._paths.items():
            step = self.steps[index]
            self.steps[index] = _but(step, optional=step.optional, goes_with=step.goes_with, path=tuple(path))
        return tuple(self.steps)

    def add(self, event: str, *fields: Expected, why: str = "", optional: bool = False) -> None:
        """Write down an event."""
        if event not in self.facts.events or event in self._never:
            return
        address, text = (self.line.address, self.line.text) if self.line else (0, "")
        self.steps.append(Step(event, fields, address, text, why, optional))

    def instruction(self, line: Line, rip: int) -> None:
        """Begin an instruction."""
        self.line = line
        self.passes(rip)

    def passes(self, rip: int) -> None:
        """Note an address at which the guest may be now, if it is in guest mode."""
        for entry in self._entries if self.in_guest else ():
            self._paths[entry][rip] = None

    @contextmanager
    def perhaps(self) -> Iterator[None]:
        """Let timing decide whether all of the steps written down meanwhile happen, or none."""
        begin, self._perhaps = len(self.steps), True
        yield
        self._perhaps = False
        if len(self.steps) > begin:
            first = self.steps[begin]
            self.steps[begin] = _but(first, optional=True, goes_with=len(self.steps) - begin - 1, path=first.path)

    # the KVM_RUN bracket

    def begin_run(self) -> None:
        """Userspace calls KVM_RUN."""
        self.add("sys_enter_ioctl", Expected("cmd", KVM_RUN), why="userspace calls KVM_RUN")
        self.add("kvm_vcpu_ioctl", Expected("cmd", KVM_RUN))
        self.add("kvm_fpu", Expected("load", 1), why="the guest's FPU state is loaded")

    def leave(self, reason: int | None, errno: int, why: str) -> None:
        """KVM_RUN returns to userspace; reason None where the kernel leaves it stale."""
        self.add("kvm_fpu", Expected("load", 0), why="the VMM's FPU state is loaded")
        fields = [Expected("errno", errno & 0xFFFFFFFF, 0xFFFFFFFF)]
        if reason is not None:
            fields.insert(0, Expected("reason", reason))
        self.add("kvm_userspace_exit", *fields, why=why)
        result = Expected("ret", errno & 0xFFFFFFFF, 0xFFFFFFFF)
        self.add("kvm_vcpu_ioctl_return", result)
        self.add("sys_exit_ioctl", result)

    # world switches

    def enter(self, rip: int) -> None:
        """Enter guest mode at `rip`, if the vCPU is not in it."""
        if self.in_guest or self._isa is None:
            return
        self.in_guest = True
        self.add(self._run)
        if not self._perhaps:
            self._entries = []
        if "kvm_entry" in self.facts.events:
            self._paths[len(self.steps)] = {rip: None}
            self._entries.append(len(self.steps))
        self.add("kvm_entry", Expected("rip", rip), Expected("vcpu_id", self.vcpu_id))

    def exit(
        self,
        kind: str,
        rip: int,
        *,
        info1: int | None = None,
        info1_mask: int | None = None,
        info2: int | None = None,
        why: str = "",
        returns: bool = True,
        vector: int = 0,
        number: int | None = None,
    ) -> None:
        """Leave guest mode: exit reason by its EXIT_KIND or `number`; not `returns` for a fast path, see run_return."""
        if self._isa is None:
            return
        fields = []
        if info1 is not None:
            fields.append(Expected("info1", info1, info1_mask))
        if info2 is not None:
            fields.append(Expected("info2", info2))
        if number is None:
            number = self.number_of(kind, vector)
        self.exit_for(number, rip, *fields, why=why, returns=returns)

    def exit_for(self, number: int, rip: int, *fields: Expected, why: str = "", returns: bool = True) -> None:
        """Leave guest mode: exit reason by its number."""
        assert self.in_guest, (number, hex(rip))
        assert self._isa is not None
        self.in_guest = False
        common = (
            Expected("exit_reason", number),
            Expected("guest_rip", rip),
            Expected("isa", self._isa.number),
            Expected("vcpu_id", self.vcpu_id),
        )
        if not self.facts.exit_inside_run:
            self.run_return()
        self.add("kvm_exit", *common, *fields, why=why or self._isa.describe(number))
        if self.facts.exit_inside_run and returns:
            self.run_return()
        if self.level > 1:
            self.add("kvm_nested_vmexit", *common, *fields, why="it was a guest of the guest that left")

    def number_of(self, kind: str, vector: int = 0) -> int:
        """Return the exit reason of a kind; of exceptions, that of their vector, if each has its own."""
        assert self._isa is not None
        if kind == "exception" and self._isa.nesting is not None:
            return self._isa.nesting.exceptions + (0 if self._isa.exit_intr_info else vector)
        return self._isa.code_of(kind)

    def run_return(self) -> None:
        """Return from the ISA's run function."""
        self.add(f"{self._run}_return")

    def io_exit(self, rip: int, port: int, size: int, *, out: bool, string: bool = False, rep: bool = False) -> None:
        """Leave for IN, OUT, INS or OUTS."""
        if self._isa is None:
            return
        assert self._isa.encode_io is not None
        assert self.line is not None
        info1, known = self._isa.encode_io(IoAccess(port, size, out, string, rep))
        next_rip = {self._isa.next_rip_field: rip + len(self.line.code)}
        self.exit("port_io", rip, info1=info1, info1_mask=known, info2=next_rip.get("info2"))

    def second_level_fault(self, rip: int, gpa: int, access: str, why: str) -> None:
        """Leave because the second-level page table does not map `gpa`."""
        if self._isa is None:
            return
        assert self._isa.encode_fault is not None
        value, mask = self._isa.encode_fault(access)
        address = {self._isa.fault_address_field: gpa}
        self.exit("second_level_fault", rip, info1=value, info1_mask=mask, info2=address.get("info2"), why=why)
        self.add(
            "kvm_page_fault",
            Expected("guest_rip", rip),
            Expected("fault_address", gpa),
            Expected("error_code", value, mask),
            Expected("vcpu_id", self.vcpu_id),
            why=why,
        )

    def mmio_exit(self, rip: int, gpa: int, access: str, *, known: bool) -> None:
        """Leave for MMIO; where KVM marks a known page, further accesses have a reason of their own."""
        if self._isa is not None and self._isa.marks_mmio and known:
            self.exit("known_mmio", rip, why="MMIO, known from before")
        else:
            self.second_level_fault(rip, gpa, access, "MMIO")

    def mmio(self, kind: int, length: int, gpa: int, value: int | None) -> None:
        """Write down kvm_mmio; a value of None is not known."""
        why = ("unsatisfied: userspace has to answer", "the answer", "")[kind]
        self.add(
            "kvm_mmio",
            Expected("type", kind),
            Expected("len", length),
            Expected("gpa", gpa),
            *([] if value is None else [Expected("val", value)]),
            why=why,
        )


def _but(step: Step, *, optional: bool, goes_with: int, path: tuple[int, ...]) -> Step:
    """Return a step with these of its fields changed."""
    return Step(step.event, step.fields, step.address, step.text, step.why, optional, goes_with, path)
