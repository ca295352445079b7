"""The story of one vCPU's thread: predicted steps as they come, with the ISAs' numbers for each VM-exit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvmtrace.isa.exit_reasons import SVM_EXIT_REASONS, VMX_EXIT_REASONS
from kvmtrace.kvm.ioctls import KVM_RUN
from kvmtrace.predict.story import Expected, Facts, Step

if TYPE_CHECKING:
    from kvmtrace.workload.listing import Line

_VMX = {name: number for number, name in VMX_EXIT_REASONS.items()}
_SVM = {name: number for number, name in SVM_EXIT_REASONS.items()}
_ISA_NUMBER = {"vmx": 1, "svm": 2}

# bits of an EPT violation's exit qualification, and of a nested page fault's error code
_EPT_ACCESS = {"read": 1, "write": 2, "fetch": 4}
_NPF_ACCESS = {"read": 0, "write": 2, "fetch": 0x10}
_NPF_USER, _NPF_FINAL = 4, 1 << 32


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
        self.line: Line | None = None
        self._paths: dict[int, dict[int, None]] = {}  # index of a kvm_entry step -> RIPs that run behind it
        self._entry = -1
        self._run = f"{facts.isa}_vcpu_run"

    def __len__(self) -> int:
        return len(self.steps)

    def finish(self) -> tuple[Step, ...]:
        """Return the steps, each kvm_entry with its path."""
        for index, path in self._paths.items():
            self.steps[index] = replace(self.steps[index], path=tuple(path))
        return tuple(self.steps)

    def add(self, event: str, *fields: Expected, why: str = "", optional: bool = False) -> None:
        """Write down an event."""
        if event not in self.facts.events:
            return
        address, text = (self.line.address, self.line.text) if self.line else (0, "")
        self.steps.append(Step(event, fields, address, text, why, optional))

    def instruction(self, line: Line, rip: int) -> None:
        """Begin an instruction."""
        self.line = line
        if self.in_guest and self._entry >= 0:
            self._paths[self._entry][rip] = None

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
        if self.in_guest or self.facts.isa == "pvm":
            return
        self.in_guest = True
        self.add(self._run)
        self._entry = len(self.steps) if "kvm_entry" in self.facts.events else -1
        self.add("kvm_entry", Expected("rip", rip), Expected("vcpu_id", self.vcpu_id))
        if self._entry >= 0:
            self._paths[self._entry] = {rip: None}

    def exit(
        self,
        vmx: str,
        svm: str,
        rip: int,
        *,
        info1: int | None = None,
        info1_mask: int | None = None,
        info2: int | None = None,
        why: str = "",
        returns: bool = True,
    ) -> None:
        """Leave guest mode: exit reason by its name on each ISA; not `returns` for a fast path, see run_return."""
        if self.facts.isa == "pvm":
            return
        assert self.in_guest, (vmx, hex(rip))
        self.in_guest = False
        number = _VMX[vmx] if self.facts.isa == "vmx" else _SVM[svm]
        fields = [
            Expected("exit_reason", number),
            Expected("guest_rip", rip),
            Expected("isa", _ISA_NUMBER[self.facts.isa]),
            Expected("vcpu_id", self.vcpu_id),
        ]
        if info1 is not None:
            fields.append(Expected("info1", info1, info1_mask))
        if info2 is not None:
            fields.append(Expected("info2", info2))
        if not self.facts.exit_inside_run:
            self.run_return()
        self.add("kvm_exit", *fields, why=why or (vmx if self.facts.isa == "vmx" else svm))
        if self.facts.exit_inside_run and returns:
            self.run_return()

    def run_return(self) -> None:
        """vmx_vcpu_run / svm_vcpu_run returns."""
        self.add(f"{self._run}_return")

    def io_exit(self, rip: int, port: int, size: int, *, out: bool, string: bool = False, rep: bool = False) -> None:
        """Leave for IN, OUT, INS or OUTS."""
        if self.facts.isa == "vmx":  # exit qualification; bit 6 only says how the operand was encoded
            info1 = port << 16 | rep << 5 | string << 4 | (not out) << 3 | size - 1
            self.exit("IO_INSTRUCTION", "io", rip, info1=info1, info1_mask=0xFFFF003F)
            return
        assert self.line is not None
        info1 = port << 16 | size << 4 | rep << 3 | string << 2 | (not out)  # EXITINFO1; [9:7] address size
        self.exit("IO_INSTRUCTION", "io", rip, info1=info1, info1_mask=0xFFFF007D, info2=rip + len(self.line.code))

    def second_level_fault(self, rip: int, gpa: int, access: str, why: str) -> None:
        """Leave because the second-level page table (EPT, NPT) does not map `gpa`."""
        if self.facts.isa == "vmx":
            value, mask = _EPT_ACCESS.get(access, 0), 7 if access in _EPT_ACCESS else 4
            self.exit("EPT_VIOLATION", "npf", rip, info1=value, info1_mask=mask, why=why)
        else:
            value = _NPF_ACCESS.get(access, 0) | _NPF_USER | _NPF_FINAL
            # whether bit 0 and 3 are set for known MMIO depends on how KVM could mark it
            mask = _NPF_FINAL | 0x16 if access in _NPF_ACCESS else _NPF_FINAL | 0x14
            self.exit("EPT_VIOLATION", "npf", rip, info1=value, info1_mask=mask, info2=gpa, why=why)
        self.add(
            "kvm_page_fault",
            Expected("guest_rip", rip),
            Expected("fault_address", gpa),
            Expected("error_code", value, mask),
            Expected("vcpu_id", self.vcpu_id),
            why=why,
        )

    def mmio_exit(self, rip: int, gpa: int, access: str, *, known: bool) -> None:
        """Leave for MMIO: VMX marks a known page so that further accesses are EPT_MISCONFIG."""
        if self.facts.isa == "vmx" and known:
            self.exit("EPT_MISCONFIG", "npf", rip, why="MMIO, known from before")
        else:
            self.second_level_fault(rip, gpa, access, "MMIO")

    def mmio(self, kind: int, length: int, gpa: int, value: int) -> None:
        """Write down kvm_mmio."""
        why = ("unsatisfied: userspace has to answer", "the answer", "")[kind]
        self.add(
            "kvm_mmio",
            Expected("type", kind),
            Expected("len", length),
            Expected("gpa", gpa),
            Expected("val", value),
            why=why,
        )
