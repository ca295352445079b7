"""A processor, with what the few instructions of a bundled guest in flat real mode use (instructions.py).

It knows what the guest's instructions do, not what a hypervisor makes of them: every instruction that could
leave guest mode calls the `Hypervisor`, which writes down the events KVM will trace (`machine.py`).

A value of None is one that the listing does not tell (what CPUID returned); it spreads through arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvmtrace.predict.operands import IF, locate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtrace.predict.operands import StringIo, Value
    from kvmtrace.workload.listing import Line, Listing


class Hypervisor(Protocol):
    """What the processor tells of; each call stands for one architectural event of the vCPU `cpu`."""

    def fetch(self, cpu: Cpu, line: Line) -> None:
        """Begin the instruction at cpu.rip."""

    def touch(self, cpu: Cpu, gpa: int, access: str) -> None:
        """Access RAM at `gpa`; access is "read" or "write"."""

    def is_mmio(self, gpa: int) -> bool:
        """Say whether no RAM lies at `gpa`."""

    def mmio(
        self, cpu: Cpu, gpa: int, size: int, write: bytes | None, modify: Callable[[bytes], bytes] | None
    ) -> bytes:
        """Read MMIO (write is None), write it, or read it and write what `modify` makes of that."""

    def out_port(self, cpu: Cpu, port: int, data: bytes) -> None:
        """Execute OUT."""

    def in_port(self, cpu: Cpu, port: int, size: int) -> bytes:
        """Execute IN."""

    def string_io(self, cpu: Cpu, access: StringIo) -> None:
        """Execute INS or OUTS, with or without REP, to its end."""

    def cpuid(self, cpu: Cpu) -> None:
        """Execute CPUID."""

    def rdmsr(self, cpu: Cpu, msr: int) -> Value:
        """Return what RDMSR reads."""

    def wrmsr(self, cpu: Cpu, msr: int, value: Value) -> bool:
        """Execute WRMSR; False if it raises #GP."""

    def halt(self, cpu: Cpu) -> Iterator[None]:
        """Execute HLT; yields for as long as the vCPU waits."""

    def deliver(self, cpu: Cpu, vector: int, *, exception: bool) -> None:
        """Inject an interrupt or exception; the processor then delivers it."""

    def triple_fault(self, cpu: Cpu) -> None:
        """Shut down."""

    def for_hypervisors(self, cpu: Cpu, name: str, operands: tuple[str, ...]) -> None:
        """Execute an instruction by which a hypervisor deals with its guest; RIP then is where it goes on."""

    def passes_on(self, cpu: Cpu) -> bool:
        """Say whether the instruction leaves a guest's guest for its hypervisor, which then goes on."""


class Cpu:
    """One vCPU.

    Parameters
    ----------
    vcpu_id : int
    listing : the guest's code
    memory : RAM, shared by all vCPUs
    hypervisor : is told of what could leave guest mode
    registers : 64-bit register names -> values at the first instruction

    Attributes
    ----------
    rip : offset within the code segment; `linear` adds the segment's base
    ended : bool
    level : int, 1; 2 in a guest of the guest
    """

    def __init__(
        self, vcpu_id: int, listing: Listing, memory: bytearray, hypervisor: Hypervisor, registers: dict[str, int]
    ) -> None:
        self.vcpu_id = vcpu_id
        self.memory = memory
        self.hypervisor = hypervisor
        self.lines = {line.address: line for line in listing.lines if not line.is_data}
        self.registers: dict[str, int] = {}
        self.unknown: dict[str, int] = {}  # register -> bits that the listing does not tell
        for name, value in registers.items():
            if name not in {"rip", "rflags"}:
                self.registers[name[1:]] = value & 0xFFFFFFFF
        self.vectors: dict[str, bytes] = {}  # XMM registers
        self.rip = registers.get("rip", 0)
        self.cs_base = 0
        self.flags = 2
        self.shadow = False  # STI holds interrupts off for one more instruction
        self.idt_limit = 0xFFFF
        self.idt_base = self.gdt_base = 0
        self.ended = False
        self.level = 1
        self.line: Line = listing.lines[0]

    @property
    def linear(self) -> int:
        """Address of the next instruction."""
        return self.cs_base + self.rip

    # registers and memory

    def get(self, name: str) -> Value:
        """Return register `name` of 8, 16 or 32 bits."""
        full, shift, bits = locate(name)
        mask = (1 << bits) - 1
        if self.unknown.get(full, 0) >> shift & mask:
            return None
        return self.registers.get(full, 0) >> shift & mask

    def set(self, name: str, value: Value) -> None:
        """Set register `name` of 8, 16 or 32 bits."""
        full, shift, bits = locate(name)
        mask = (1 << bits) - 1 << shift
        self.unknown[full] = self.unknown.get(full, 0) & ~mask | (mask if value is None else 0)
        self.registers[full] = self.registers.get(full, 0) & ~mask | (value or 0) << shift & mask

    def number(self, name: str) -> int:
        """Return a register whose value the listing must tell."""
        value = self.get(name)
        assert value is not None, f"{name} is not known at {self.line.address:#x}"
        return value

    def read(self, gpa: int, size: int) -> bytes:
        """Read RAM or MMIO."""
        if self.hypervisor.is_mmio(gpa):
            return self.hypervisor.mmio(self, gpa, size, None, None)
        self.hypervisor.touch(self, gpa, "read")
        return bytes(self.memory[gpa : gpa + size])

    def write(self, gpa: int, data: bytes) -> None:
        """Write RAM or MMIO."""
        if self.hypervisor.is_mmio(gpa):
            self.hypervisor.mmio(self, gpa, len(data), data, None)
            return
        self.hypervisor.touch(self, gpa, "write")
        self.memory[gpa : gpa + len(data)] = data

    def push(self, value: int, size: int = 2) -> None:
        """Push a word, or a double word in protected mode."""
        self.set("sp", self.number("sp") - size & 0xFFFF)
        self.write(self.number("sp"), value.to_bytes(size, "little"))

    def pop(self, size: int = 2) -> int:
        """Pop what was pushed."""
        value = int.from_bytes(self.read(self.number("sp"), size), "little")
        self.set("sp", self.number("sp") + size & 0xFFFF)
        return value

    # execution

    def advance(self) -> None:
        """Step behind the current instruction."""
        self.rip += len(self.line.code)

    def interrupt(self, vector: int, *, return_rip: int) -> None:
        """Deliver an interrupt or exception through the vector table of the mode."""
        if self.lines[self.linear].bits == 32:
            self._interrupt_gate(vector, return_rip)
            return
        if vector * 4 + 3 > self.idt_limit:
            self.hypervisor.triple_fault(self)
            self.ended = True
            return
        target = int.from_bytes(self.read(vector * 4, 4), "little")
        for word in (self.flags, self.cs_base >> 4, return_rip):
            self.push(word)
        self.flags &= ~IF
        self.rip, self.cs_base = target & 0xFFFF, target >> 16 << 4

    def _interrupt_gate(self, vector: int, return_rip: int) -> None:
        """Deliver an interrupt in flat protected mode, at the same privilege."""
        gate = self.read(self.idt_base + vector * 8, 8)
        selector = int.from_bytes(gate[2:4], "little")
        self.read(self.gdt_base + (selector & ~7), 8)
        for word in (self.flags, selector, return_rip):
            self.push(word, 4)
        self.flags &= ~IF
        self.rip = int.from_bytes(gate[:2] + gate[6:], "little")
