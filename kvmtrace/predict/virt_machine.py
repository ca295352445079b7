"""What KVM/arm64 traces for each thing a bundled guest does: the hypervisor's side of a prediction.

One method per architectural event (`el1_cpu.Arm64Hypervisor`), each a short story in tracepoints. kvm_entry shows
the program counter before KVM steps over the instruction, or enters the exception vector, which it does behind the
trace: so an entry mostly shows where the exit before it was.

Sources: arch/arm64/kvm/arm.c (kvm_arch_vcpu_ioctl_run), handle_exit.c, mmu.c (kvm_handle_guest_abort), mmio.c
(io_mem_abort, kvm_handle_mmio_return), sys_regs.c (kvm_handle_sys_reg, perform_access), psci.c; and recordings of all
guests, with and without the virtualization host extensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.isa.arm64_words import (
    CLASS_MASK,
    CLASS_SHIFT,
    DABT_CLASS,
    IABT_CLASS,
    SYS_CLASS,
    TRAP_CODES,
    DataAbort,
    decode_system_register,
    encode_abort,
    encode_system_register,
)
from kvmtrace.predict.all_vcpus import PAGE, AllVcpus
from kvmtrace.predict.el1_cpu import INSTRUCTION_BYTES, SPURIOUS, SYNCHRONOUS_VECTOR, Arm64Cpu, Transfer
from kvmtrace.predict.story import Expected
from kvmtrace.workload.arm64_vmm import DISTRIBUTOR_GPA, REDISTRIBUTOR_BYTES, REDISTRIBUTOR_GPA
from kvmtrace.workload.devices import EXIT_ADDRESS
from kvmtrace.workload.guests import RAM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.predict.story import Facts, Prediction
    from kvmtrace.workload import Guest
    from kvmtrace.workload.listing import Line

    Value = int | None

WFX, HVC, SMC, SYS = (TRAP_CODES | code for code in (0x01, 0x16, 0x17, SYS_CLASS))
KVM_EXIT_MMIO, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_ARM_NISV = 6, 24, 28
MMIO_UNSATISFIED, MMIO_READ, MMIO_WRITE = 0, 1, 2  # KVM_TRACE_MMIO_*
PSCI_SYSTEM_OFF, PSCI_CPU_ON = 0x84000008, 0xC4000003
VIRTUAL_TIMER = 27
# not trapped where the interrupt controller has its system registers: the processor and the vGIC keep them
KEPT = frozenset({"cntv_tval_el0", "cntv_ctl_el0", "icc_pmr_el1", "icc_igrpen1_el1", "icc_eoir1_el1"})
HIDDEN = frozenset({"pmcr_el0"})  # of a processor without a performance monitor: an undefined instruction


class Arm64Machine(AllVcpus):
    """The machine and its vCPUs; see AllVcpus.

    Parameters
    ----------
    guest, arguments, facts, max_steps : see `guest_prediction.predict`
    shared : pages that several vCPUs touch: timing decides whose access is the first
    """

    def __init__(
        self,
        guest: Guest,
        arguments: dict[str, int],
        facts: Facts,
        max_steps: int,
        shared: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(guest, facts, max_steps)
        self.shared = shared
        self.touched: set[tuple[int, int]] = set()  # (vCPU, page)
        registers = guest.registers(arguments)
        self.cpus = [
            Arm64Cpu(vcpu_id, guest.listing, self.memory, self, registers if not vcpu_id else {})
            for vcpu_id in range(guest.n_vcpus)
        ]
        self.shown: dict[int, int] = {}  # vCPU -> what its next kvm_entry shows, if not where it goes on
        self.pending: list[list[int]] = [[] for _ in self.cpus]  # interrupts that wait for each vCPU
        self.started: dict[int, tuple[int, int]] = {}  # vCPU -> where PSCI CPU_ON lets it begin, and its X0

    def runs(self) -> list[Iterator[None]]:
        """Return the execution of each vCPU."""
        return [self._vcpu(cpu) for cpu in self.cpus]

    def shared_pages(self) -> frozenset[int]:
        """Return the pages that several vCPUs have touched."""
        pages = [page for _, page in self.touched]
        return frozenset(page for page in pages if pages.count(page) > 1)

    def _vcpu(self, cpu: Arm64Cpu) -> Iterator[None]:
        self.stories[cpu.vcpu_id].begin_run()
        if cpu.vcpu_id:
            while cpu.vcpu_id not in self.started:  # asleep within KVM_RUN
                yield
            cpu.pc, cpu.x[0] = self.started[cpu.vcpu_id]
        yield from cpu.run()

    # what the processor tells (Arm64Hypervisor)

    def fetch(self, cpu: Arm64Cpu, line: Line) -> None:
        """Begin an instruction: its page may be touched for the first time."""
        story = self.begin(cpu.vcpu_id, line, cpu.pc)
        story.enter(self.shown.pop(cpu.vcpu_id, cpu.pc))
        story.passes(cpu.pc)
        self.touch(cpu, cpu.pc, "fetch")

    def is_mmio(self, gpa: int) -> bool:
        """Say whether no RAM lies there."""
        return gpa >= RAM_BYTES

    def touch(self, cpu: Arm64Cpu, gpa: int, access: str) -> None:
        """Access RAM: the first access to a page faults once."""
        page = gpa // PAGE
        first = (cpu.vcpu_id, page) not in self.touched
        self.touched.add((cpu.vcpu_id, page))
        story = self.stories[cpu.vcpu_id]
        if page in self.shared and first:
            with story.perhaps():
                self._map(cpu, gpa, access)
        elif page not in self.mapped:
            self._map(cpu, gpa, access)
        self.mapped.add(page)

    def mmio(self, cpu: Arm64Cpu, gpa: int, transfer: Transfer, value: Value) -> Value:
        """MMIO: described by the syndrome, or left to the VMM as it is; the kernel serves its own devices."""
        abort = DataAbort(
            not transfer.pair,
            transfer.size,
            transfer.register,
            transfer.signed,
            transfer.sixty_four,
            transfer.write,
            table_walk=False,
            fault="",
        )
        self._fault(cpu, gpa, encode_abort(abort), "no RAM is there")
        if transfer.pair:
            self.leave_and_return(cpu.vcpu_id, KVM_EXIT_ARM_NISV, "the VMM steps over it")
            self.shown[cpu.vcpu_id] = cpu.pc + INSTRUCTION_BYTES
            return None
        self.shown[cpu.vcpu_id] = cpu.pc
        if not transfer.write:
            return self._read(cpu, gpa, transfer)
        self._write(cpu, gpa, transfer, value)
        return None

    def system_register(self, cpu: Arm64Cpu, name: str, register: int, value: Value, *, write: bool) -> Value:
        """MRS and MSR."""
        if name in KEPT:
            if name == "cntv_ctl_el0" and value:
                self.pending[cpu.vcpu_id].append(VIRTUAL_TIMER)
            return None
        esr = encode_system_register(name, register, write=write)
        told = decode_system_register(esr)
        story = self.stories[cpu.vcpu_id]
        self._exit(cpu, SYS, cpu.pc)
        story.add("kvm_handle_sys_reg", Expected("hsr", esr), why=told.name)
        story.add(
            "kvm_sys_access",
            Expected("vcpu_pc", cpu.pc),
            Expected("is_write", int(write)),
            Expected("Op0", told.op0),
            Expected("Op1", told.op1),
            Expected("CRn", told.crn),
            Expected("CRm", told.crm),
            Expected("Op2", told.op2),
            why=told.name,
        )
        if name in HIDDEN:
            cpu.enter_exception(SYNCHRONOUS_VECTOR)
        elif name == "icc_sgi1r_el1":
            assert value is not None
            self._send(value)
        return None

    def wait(self, cpu: Arm64Cpu) -> Iterator[None]:
        """WFI: trapped unless an interrupt is pending, or the thread is alone on its CPU."""
        story = self.stories[cpu.vcpu_id]
        with story.perhaps():
            self._exit(cpu, WFX, cpu.pc)
            story.add("kvm_wfx_arm64", Expected("vcpu_pc", cpu.pc), Expected("is_wfe", 0), why="blocks the vCPU")
            while not self.pending[cpu.vcpu_id]:
                yield
            story.add("kvm_vcpu_wakeup", why="unless the interrupt was there already", optional=True)
            story.enter(self.shown.pop(cpu.vcpu_id))

    def acknowledge(self, cpu: Arm64Cpu) -> int:
        """Return the pending interrupt."""
        pending = self.pending[cpu.vcpu_id]
        return pending.pop(0) if pending else SPURIOUS

    def has_interrupt(self, cpu: Arm64Cpu) -> bool:
        """Say whether an interrupt is pending."""
        return bool(self.pending[cpu.vcpu_id])

    def call(self, cpu: Arm64Cpu, *, secure: bool) -> None:
        """HVC, which the processor has stepped over when it exits; SMC, which KVM steps over."""
        story, function = self.stories[cpu.vcpu_id], cpu.get("x0")
        at = cpu.pc if secure else cpu.pc + INSTRUCTION_BYTES
        self._exit(cpu, SMC if secure else HVC, at)
        if not secure:
            known = [] if function is None else [Expected("r0", function)]
            story.add("kvm_hvc_arm64", Expected("vcpu_pc", at), *known, Expected("imm", 0), why="PSCI")
        if function == PSCI_SYSTEM_OFF and not secure:
            story.leave(KVM_EXIT_SYSTEM_EVENT, 0, "the guest switches the machine off")
            cpu.ended = True
        elif function == PSCI_CPU_ON and not secure:
            self.started[cpu.number("x1")] = cpu.number("x2"), cpu.number("x3")
        cpu.set("x0", None)

    # parts of the above

    def _exit(self, cpu: Arm64Cpu, code: int, pc: int, why: str = "") -> None:
        self.stories[cpu.vcpu_id].exit_for(code, pc, why=why)
        self.shown[cpu.vcpu_id] = pc

    def _fault(self, cpu: Arm64Cpu, gpa: int, syndrome: tuple[int, int], why: str) -> None:
        """Leave because stage 2 does not map `gpa`; syndrome: its value, and which bits are known."""
        esr, mask = syndrome
        self._exit(cpu, TRAP_CODES | esr >> CLASS_SHIFT, cpu.pc, why)
        self.stories[cpu.vcpu_id].add(
            "kvm_guest_fault",
            Expected("vcpu_pc", cpu.pc),
            Expected("hsr", esr, mask),
            Expected("hxfar", gpa),
            Expected("ipa", gpa // PAGE * PAGE),
            why=why,
        )

    def _map(self, cpu: Arm64Cpu, gpa: int, access: str) -> None:
        """Fault on a page, which is mapped; the guest tries again."""
        if access == "fetch":
            syndrome = IABT_CLASS << CLASS_SHIFT, CLASS_MASK
        else:
            syndrome = DABT_CLASS << CLASS_SHIFT | (access == "write") << 6, CLASS_MASK | 1 << 6
        self._fault(cpu, gpa, syndrome, "first touch of the page")
        self.stories[cpu.vcpu_id].enter(self.shown.pop(cpu.vcpu_id))

    def _write(self, cpu: Arm64Cpu, gpa: int, transfer: Transfer, value: Value) -> None:
        told = None if value is None else value & (1 << 8 * transfer.size) - 1
        self.stories[cpu.vcpu_id].mmio(MMIO_WRITE, transfer.size, gpa, told)
        if gpa == EXIT_ADDRESS:
            self.stories[cpu.vcpu_id].leave(KVM_EXIT_MMIO, 0, "the guest is done")
            cpu.ended = True
        elif not self._in_kernel(gpa):
            self.leave_and_return(cpu.vcpu_id, KVM_EXIT_MMIO, "the VMM's device takes it")

    def _read(self, cpu: Arm64Cpu, gpa: int, transfer: Transfer) -> int:
        story = self.stories[cpu.vcpu_id]
        assert not self._in_kernel(gpa), "no guest reads a register of the interrupt controller"
        story.mmio(MMIO_UNSATISFIED, transfer.size, gpa, 0)
        self.leave_and_return(cpu.vcpu_id, KVM_EXIT_MMIO, "the VMM's device answers")
        data = self.devices[cpu.vcpu_id].read(transfer.size)
        story.mmio(MMIO_READ, transfer.size, gpa, int.from_bytes(data, "little"))
        return int.from_bytes(data, "little", signed=transfer.signed)

    def _in_kernel(self, gpa: int) -> bool:
        """Say whether the interrupt controller is there."""
        end = REDISTRIBUTOR_GPA + REDISTRIBUTOR_BYTES * self.guest.n_vcpus
        return self.guest.irqchip and DISTRIBUTOR_GPA <= gpa < end

    def _send(self, sgi: int) -> None:
        """Queue a software-generated interrupt for the vCPUs in its target list."""
        for vcpu_id, pending in enumerate(self.pending):
            if sgi >> vcpu_id & 1:
                pending.append(sgi >> 24 & 0xF)


def predict(guest: Guest, arguments: dict[str, int], facts: Facts, max_steps: int) -> tuple[Prediction, ...]:
    """Predict the events of a guest: executed a second time, if only the first tells which pages its vCPUs race for."""
    machine = Arm64Machine(guest, arguments, facts, max_steps)
    machine.run()
    shared = machine.shared_pages()
    if shared:
        machine = Arm64Machine(guest, arguments, facts, max_steps, shared)
        machine.run()
    return machine.predictions()
