"""What KVM traces for each thing a bundled guest does: the hypervisor's side of a prediction.

One method per architectural event (`cpu.Hypervisor`), each a short story in tracepoints. The ISAs
differ in the exit that begins it and in little else; PVM runs kernel-mode code in KVM's emulator, so that
instead of entries and exits every instruction is traced as kvm_emulate_insn.

Sources: arch/x86/kvm/x86.c (vcpu_run, complete_fast_pio_in, emulator_read_write, complete_emulated_mmio,
kvm_emulate_rdmsr, kvm_emulate_wrmsr, kvm_emulate_halt), emulate.c (pio_in_emulated), lapic.c
(kvm_x2apic_msr_write), vmx/vmx.c, svm/svm.c; virt/kvm/kvm_main.c (kvm_vcpu_ioctl); and recordings of all
guests on VMX and SVM with 6.1 and 6.12, and on PVM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.isa.registry import BY_NAME
from kvmtrace.predict.all_vcpus import PAGE, AllVcpus
from kvmtrace.predict.cpu import Cpu
from kvmtrace.predict.instructions import execute
from kvmtrace.predict.nested_guests import NestedGuest
from kvmtrace.predict.story import PVM, Expected
from kvmtrace.workload.devices import EXIT_PORT
from kvmtrace.workload.guests import RAM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtrace.predict.operands import StringIo, Value
    from kvmtrace.predict.story import Facts
    from kvmtrace.workload import Guest
    from kvmtrace.workload.listing import Line

EAGAIN = 11
KVM_EXIT_IO, KVM_EXIT_HLT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN = 2, 5, 6, 8
MMIO_UNSATISFIED, MMIO_READ, MMIO_WRITE = 0, 1, 2  # KVM_TRACE_MMIO_*
PIO_IN, PIO_OUT = 0, 1  # KVM_PIO_*
PIO_BUFFER_BYTES = 1024  # struct read_cache of emulate.c

MSR_APIC_BASE, MSR_PAT = 0x1B, 0x277
X2APIC_MSRS = range(0x800, 0x900)
X2APIC_EOI, X2APIC_ICR, X2APIC_LVTT, X2APIC_TMICT = 0x80B, 0x830, 0x832, 0x838
APIC_BASE_RESERVED = 0x2FF  # below the enable, x2APIC and BSP bits
RESET_MSRS = {MSR_PAT: 0x0007040600070406, MSR_APIC_BASE: 0xFEE00800}
APIC_BASE_BSP = 0x100
ICR_MODE, ICR_FIXED, ICR_INIT, ICR_STARTUP = 0x700, 0x000, 0x500, 0x600


class Machine(AllVcpus):
    """The PC and its vCPUs; see AllVcpus.

    Parameters
    ----------
    guest, arguments, facts, max_steps : see `prediction.predict`
    """

    def __init__(self, guest: Guest, arguments: dict[str, int], facts: Facts, max_steps: int) -> None:
        super().__init__(guest, facts, max_steps)
        self.isa = BY_NAME.get(facts.isa)  # None: PVM
        self.touched: set[tuple[int, int]] = set()  # (level, page) that KVM has mapped: each level has its own table
        self.mmio_known: set[int] = set()  # pages whose MMIO the second-level table remembers
        self.cpus = [
            Cpu(vcpu_id, guest.listing, self.memory, self, guest.registers(arguments) if not vcpu_id else {})
            for vcpu_id in range(guest.n_vcpus)
        ]
        nesting = self.isa.nesting if self.isa else None
        entry = nesting.entry if nesting else None
        self.guests = [NestedGuest(nesting, entry, story) for story in self.stories] if nesting and entry else []
        self.msrs: list[dict[int, Value]] = [dict(RESET_MSRS) for _ in self.cpus]
        self.msrs[0][MSR_APIC_BASE] = RESET_MSRS[MSR_APIC_BASE] | APIC_BASE_BSP
        self.pending: list[list[int]] = [[] for _ in self.cpus]  # vectors that wait for each vCPU
        self.in_service: dict[int, int] = {}  # vector that a vCPU's next EOI ends: interrupts never nest here
        self.startup: dict[int, int] = {}  # vcpu_id -> address that its start-up IPI named

    def runs(self) -> list[Iterator[None]]:
        """Return the execution of each vCPU."""
        return [self._vcpu(cpu) for cpu in self.cpus]

    def _vcpu(self, cpu: Cpu) -> Iterator[None]:
        story = self.stories[cpu.vcpu_id]
        story.begin_run()
        if cpu.vcpu_id:
            while cpu.vcpu_id not in self.startup:
                yield
            story.leave(None, -EAGAIN, "the start-up IPI woke it; KVM_RUN has to be called again")
            story.begin_run()
            cpu.cs_base = self.startup[cpu.vcpu_id]
        yield from execute(cpu)

    # what the processor tells (Hypervisor)

    def fetch(self, cpu: Cpu, line: Line) -> None:
        """Begin an instruction: its page may be touched for the first time; PVM emulates it."""
        story = self.begin(cpu.vcpu_id, line, cpu.rip)
        if self.facts.isa == PVM:
            self._emulate(cpu)
        else:
            story.enter(cpu.rip)
            if self.guest.protected is not None and line.bits == 32:
                self.touch(cpu, self.guest.protected.page_directory, "walk")
            self.touch(cpu, cpu.linear, "fetch")

    def is_mmio(self, gpa: int) -> bool:
        """Say whether no RAM lies there."""
        return gpa >= RAM_BYTES

    def touch(self, cpu: Cpu, gpa: int, access: str) -> None:
        """Access RAM: the first access to a page faults once, whatever its kind, as the VMM wrote it before."""
        if self.facts.isa == PVM or (cpu.level, gpa // PAGE) in self.touched:
            return
        self.touched.add((cpu.level, gpa // PAGE))
        story = self.stories[cpu.vcpu_id]
        story.second_level_fault(cpu.rip, gpa, access, "first touch of the page")
        story.enter(cpu.rip)

    def cpuid(self, cpu: Cpu) -> None:
        """CPUID: always in the kernel."""
        story = self.stories[cpu.vcpu_id]
        story.exit("cpuid", cpu.rip)
        inputs = (("function", cpu.get("eax")), ("index", cpu.get("ecx")))
        fields = [Expected(name, value) for name, value in inputs if value is not None]
        story.add("kvm_cpuid", *fields, why="answered from the table of KVM_SET_CPUID2")
        self._skip(cpu)

    def rdmsr(self, cpu: Cpu, msr: int) -> Value:
        """RDMSR of a register that KVM intercepts."""
        value = self.msrs[cpu.vcpu_id].get(msr)
        self.stories[cpu.vcpu_id].exit("msr_read", cpu.rip, info1=self._msr_word(write=False))
        self._msr(cpu, msr, value, write=False)
        self._skip(cpu)
        return value

    def wrmsr(self, cpu: Cpu, msr: int, value: Value) -> bool:
        """WRMSR of a register that KVM intercepts; x2APIC registers have effects of their own."""
        if msr == X2APIC_EOI and self.facts.apicv:
            return True  # virtualised: the guest stays in guest mode
        story = self.stories[cpu.vcpu_id]
        info1 = self._msr_word(write=True)
        fast = msr == X2APIC_ICR and self._has_fast_path(value)
        late = fast and not self.facts.exit_inside_run
        if not late:
            story.exit("msr_write", cpu.rip, info1=info1, returns=not fast)
        if msr == MSR_APIC_BASE and value is not None and value & APIC_BASE_RESERVED & ~APIC_BASE_BSP:
            self._msr(cpu, msr, value, write=True, exception=True)
            return False
        self.msrs[cpu.vcpu_id][msr] = value
        if msr in X2APIC_MSRS:
            assert value is not None
            self._x2apic_write(cpu, msr, value)
        self._msr(cpu, msr, value, write=True)
        if late:  # the fast path has skipped the instruction before the exit is traced
            story.exit("msr_write", cpu.rip + len(cpu.line.code), info1=info1)
        elif fast:
            story.run_return()
        else:
            self._skip(cpu)
        return True

    def out_port(self, cpu: Cpu, port: int, data: bytes) -> None:
        """OUT: traced at the exit; the instruction is skipped when userspace is done."""
        story = self.stories[cpu.vcpu_id]
        story.io_exit(cpu.rip, port, len(data), out=True)
        self._pio(cpu, PIO_OUT, port, data, size=len(data))
        if port == EXIT_PORT:
            story.leave(KVM_EXIT_IO, 0, "the guest is done")
            cpu.ended = True
            return
        self._userspace(cpu, KVM_EXIT_IO, "the VMM's device takes it")

    def in_port(self, cpu: Cpu, port: int, size: int) -> bytes:
        """IN: traced only when userspace has answered."""
        self.stories[cpu.vcpu_id].io_exit(cpu.rip, port, size, out=False)
        self._userspace(cpu, KVM_EXIT_IO, "the VMM's device answers")
        data = self.devices[cpu.vcpu_id].read(size)
        self._pio(cpu, PIO_IN, port, data, size=size)
        return data

    def string_io(self, cpu: Cpu, access: StringIo) -> None:
        """INS and OUTS: emulated; a REP comes back at the same RIP until nothing is left to do."""
        story = self.stories[cpu.vcpu_id]
        port = cpu.number("dx")
        left = cpu.number("cx") if access.rep else 1
        first = True
        while True:
            if not first:
                story.instruction(cpu.line, cpu.rip)
                story.enter(cpu.rip)
            if self.facts.isa != PVM or not first:
                story.io_exit(cpu.rip, port, access.size, out=access.out, string=True, rep=access.rep)
                self._emulate(cpu)
            first = False
            if not left:
                return
            left -= self._string_elements(cpu, access, port, left)
            if not access.rep:
                return
            cpu.set("cx", left)

    def mmio(
        self, cpu: Cpu, gpa: int, size: int, write: bytes | None, modify: Callable[[bytes], bytes] | None
    ) -> bytes:
        """MMIO: emulated; pieces of up to 8 bytes leave to userspace one after the other, without entry."""
        if self.facts.isa != PVM:
            story = self.stories[cpu.vcpu_id]
            access = "modify" if modify else "read" if write is None else "write"
            story.mmio_exit(cpu.rip, gpa, access, known=gpa // PAGE in self.mmio_known)
            self.mmio_known.add(gpa // PAGE)
            self._emulate(cpu)
        parts = _page_parts(gpa, size)
        data = b""
        if write is None:
            data = self._mmio_read(cpu, gpa, size, parts)
        if write is not None or modify is not None:
            self._mmio_write(cpu, parts, write if write is not None else modify(data) if modify else b"")
        return data

    def halt(self, cpu: Cpu) -> Iterator[None]:
        """HLT: to userspace without interrupt controllers in the kernel, else blocked until an interrupt."""
        story = self.stories[cpu.vcpu_id]
        story.exit("halt", cpu.rip)
        self._skip(cpu)
        if not self.guest.irqchip:
            self._userspace(cpu, KVM_EXIT_HLT, "no interrupt controller in the kernel: the VMM wakes it")
            cpu.advance()
            return
        while not self.pending[cpu.vcpu_id]:
            yield
        vector = self.in_service[cpu.vcpu_id] = self.pending[cpu.vcpu_id].pop(0)
        story.add("kvm_vcpu_wakeup", why="unless the interrupt was there already", optional=True)
        cpu.advance()
        self.deliver(cpu, vector, exception=False)
        cpu.interrupt(vector, return_rip=cpu.rip)

    def deliver(self, cpu: Cpu, vector: int, *, exception: bool) -> None:
        """Inject: traced before the entry, at which RIP still is that of the interrupted code."""
        story = self.stories[cpu.vcpu_id]
        if exception:
            story.add(
                "kvm_inj_exception",
                Expected("exception", vector),
                Expected("reinjected", 0),
                why="instead of skipping the instruction",
            )
        elif self.facts.isa == PVM:
            self._eoi(cpu, vector, "PVM ends the interrupt as it delivers it")
        elif not self.facts.apicv:
            story.add("kvm_inj_virq", Expected("vector", vector), Expected("soft", 0), why="wakes the guest")
        if self.facts.isa != PVM:
            story.enter(cpu.rip)

    def triple_fault(self, cpu: Cpu) -> None:
        """Shut down: delivering an exception failed, and so did delivering that failure."""
        story = self.stories[cpu.vcpu_id]
        if self.facts.isa == PVM:
            story.add("kvm_inj_exception", why="the emulator's attempt to deliver the failure")
        story.exit("triple_fault", cpu.rip)
        story.leave(KVM_EXIT_SHUTDOWN, 0, "nothing can be delivered any more")

    def for_hypervisors(self, cpu: Cpu, name: str, operands: tuple[str, ...]) -> None:
        """Carry out an instruction by which the guest deals with a guest of its own: it leaves guest mode first."""
        nested = self.guests[cpu.vcpu_id]
        if nested.leaves(cpu, name, operands):
            assert self.isa is not None
            assert self.isa.nesting is not None
            assert self.isa.nesting.entry is not None
            number = self.isa.nesting.entry.instructions[name]
            self.stories[cpu.vcpu_id].exit("nested_entry", cpu.rip, number=number)
            self._skip(cpu)
        nested.execute(cpu, name, operands)

    def passes_on(self, cpu: Cpu) -> bool:
        """Leave a guest's guest for its hypervisor, if that asked for it."""
        return self.guests[cpu.vcpu_id].passes_on(cpu)

    # parts of the above

    def _emulate(self, cpu: Cpu) -> None:
        fields = (
            Expected("rip", cpu.rip),
            Expected("csbase", cpu.cs_base),
            Expected("len", len(cpu.line.code)),
            Expected("insn", cpu.line.code),
            Expected("failed", 0),
        )
        self.stories[cpu.vcpu_id].add("kvm_emulate_insn", *fields, why="decoded by KVM's emulator")

    def _skip(self, cpu: Cpu) -> None:
        """Step behind an intercepted instruction; without next RIP KVM decodes it for its length."""
        if self.isa is not None and self.isa.decodes_to_skip and not self.facts.nrips:
            self._emulate(cpu)

    def _msr(self, cpu: Cpu, msr: int, value: Value, *, write: bool, exception: bool = False) -> None:
        fields = [Expected("write", int(write)), Expected("ecx", msr), Expected("exception", int(exception))]
        if value is not None:
            fields.append(Expected("data", value))
        self.stories[cpu.vcpu_id].add("kvm_msr", *fields, why="raises #GP" if exception else "")

    def _has_fast_path(self, icr: Value) -> bool:
        """Say whether KVM sends this IPI inside its run function (handle_fastpath_set_x2apic_icr_irqoff)."""
        fixed = icr is not None and icr & ICR_MODE == ICR_FIXED
        return fixed and self.isa is not None and (self.facts.nrips or not self.isa.decodes_to_skip)

    def _msr_word(self, *, write: bool) -> int:
        return 0 if self.isa is None or self.isa.encode_msr is None else self.isa.encode_msr(write)

    def _x2apic_write(self, cpu: Cpu, msr: int, value: int) -> None:
        """Write an x2APIC register: its effect is traced before the register itself."""
        if msr == X2APIC_EOI:
            vector = -1 if self.facts.isa == PVM else self.in_service[cpu.vcpu_id]
            self._eoi(cpu, vector, "end of interrupt")
            return
        if msr == X2APIC_ICR:
            self._send_ipi(cpu, value)
        register = (msr - 0x800) << 4
        self.stories[cpu.vcpu_id].add(
            "kvm_apic", Expected("rw", 1), Expected("reg", register), Expected("val", value), why="x2APIC register"
        )
        if msr == X2APIC_TMICT:
            self._queue(cpu.vcpu_id, (self.msrs[cpu.vcpu_id].get(X2APIC_LVTT) or 0) & 0xFF)

    def _eoi(self, cpu: Cpu, vector: int, why: str) -> None:
        story = self.stories[cpu.vcpu_id]
        story.add("kvm_apic", Expected("rw", 1), Expected("reg", 0xB0), Expected("val", 0), why=why)
        ended = Expected("vector", vector & 0xFFFFFFFF, 0xFFFFFFFF)
        story.add("kvm_eoi", Expected("apicid", cpu.vcpu_id), ended, why=why)

    def _send_ipi(self, cpu: Cpu, icr: int) -> None:
        target, mode, vector = icr >> 32, icr & ICR_MODE, icr & 0xFF
        story = self.stories[cpu.vcpu_id]
        story.add(
            "kvm_apic_ipi", Expected("icr_low", icr & 0xFFFFFFFF), Expected("dest_id", target), why=f"to vCPU {target}"
        )
        story.add(
            "kvm_apic_accept_irq",
            Expected("apicid", target),
            Expected("vec", vector),
            Expected("dm", mode),
            why=f"the local APIC of vCPU {target} takes it",
        )
        if mode == ICR_STARTUP:
            self.startup[target] = vector << 12
        elif mode == ICR_FIXED:
            self._queue(target, vector)

    def _queue(self, vcpu_id: int, vector: int) -> None:
        self.pending[vcpu_id].append(vector)

    def _userspace(self, cpu: Cpu, reason: int, why: str) -> None:
        self.leave_and_return(cpu.vcpu_id, reason, why)

    def _pio(self, cpu: Cpu, rw: int, port: int, data: bytes, *, size: int, count: int = 1) -> None:
        value = int.from_bytes(data[:size], "little")
        fields = (
            Expected("rw", rw),
            Expected("port", port),
            Expected("size", size),
            Expected("count", count),
            Expected("val", value),
        )
        why = "the completion of IN" if rw == PIO_IN else ""
        self.stories[cpu.vcpu_id].add("kvm_pio", *fields, why=why)

    def _string_elements(self, cpu: Cpu, access: StringIo, port: int, left: int) -> int:
        """Do as many elements as one userspace exit carries; return how many."""
        register = "si" if access.out else "di"
        address = cpu.number(register)
        if access.out:
            count = 1
            data = bytes(cpu.memory[address : address + access.size])  # read by the host: no fault
            self._pio(cpu, PIO_OUT, port, data, size=access.size)
            self._userspace(cpu, KVM_EXIT_IO, "one element")
        else:
            # the page's room counts bytes although the others count elements: so does pio_in_emulated
            count = min(PAGE - address % PAGE, PIO_BUFFER_BYTES // access.size, left)
            self._userspace(cpu, KVM_EXIT_IO, f"{count} elements at once")
            data = self.devices[cpu.vcpu_id].read(count * access.size)
            self._pio(cpu, PIO_IN, port, data, size=access.size, count=count)
            cpu.memory[address : address + len(data)] = data
        cpu.set(register, address + count * access.size)
        return count

    def _mmio_read(self, cpu: Cpu, gpa: int, size: int, parts: list[tuple[int, int]]) -> bytes:
        story = self.stories[cpu.vcpu_id]
        # one event for all pages: the first address with the last part's length (read_exit_mmio)
        story.mmio(MMIO_UNSATISFIED, parts[-1][1], gpa, 0)
        data = b""
        for _, length in parts:
            for piece in _pieces(length):
                self._userspace(cpu, KVM_EXIT_MMIO, f"{piece} bytes")
                data += self.devices[cpu.vcpu_id].read(piece)
        # the first fragment's address has advanced by its pieces of 8 (complete_emulated_mmio)
        advanced = gpa + (parts[0][1] - 1) // 8 * 8
        story.mmio(MMIO_READ, size, advanced, int.from_bytes(data[:8], "little"))
        return data

    def _mmio_write(self, cpu: Cpu, parts: list[tuple[int, int]], data: bytes) -> None:
        story = self.stories[cpu.vcpu_id]
        offset = 0
        for gpa, length in parts:
            story.mmio(MMIO_WRITE, length, gpa, int.from_bytes(data[offset : offset + min(length, 8)], "little"))
            offset += length
        for _, length in parts:
            for piece in _pieces(length):
                self._userspace(cpu, KVM_EXIT_MMIO, f"{piece} bytes")


def _page_parts(gpa: int, size: int) -> list[tuple[int, int]]:
    """Split an access at the page boundary: (gpa, length) of one or two parts."""
    room = PAGE - gpa % PAGE
    return [(gpa, size)] if size <= room else [(gpa, room), (gpa + room, size - room)]


def _pieces(length: int) -> list[int]:
    """Split a part into what one KVM_EXIT_MMIO carries."""
    return [min(8, length - start) for start in range(0, length, 8)]
