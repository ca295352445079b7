"""A processor that executes a bundled guest's listing: flat real mode, the few instructions the guests use.

It knows what the guest's instructions do, not what a hypervisor makes of them: every instruction that could
leave guest mode calls the `Hypervisor`, which writes down the events KVM will trace (`predict_kvm.py`).

A value of None is one that the listing does not tell (what CPUID returned); it spreads through arithmetic.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtrace.workload.listing import Line, Listing

Value = int | None

IF = 1 << 9
ZF = 1 << 6
_LETTERS = ("a", "c", "d", "b")
_WIDE = {"si", "di", "sp", "bp"}
_MEMORY = re.compile(r"(?:(?P<size>byte|word|dword) )?\[(?:(?P<base>[a-z]+)\+)?(?P<offset>0x[0-9a-f]+|\d+)\]")
_SIZES = {"byte": 1, "word": 2, "dword": 4}
_STRING_IO = re.compile(r"(?P<rep>rep )?(?P<way>in|out)s(?P<size>[bwd])$")


class Hypervisor(Protocol):
    """What the processor tells of; each call stands for one architectural event of the vCPU `cpu`."""

    def fetch(self, cpu: Cpu, line: Line) -> None:
        """Begin the instruction at cpu.rip."""

    def touch(self, cpu: Cpu, gpa: int, access: str) -> None:
        """Access RAM at `gpa`; access is "read" or "write"."""

    def is_mmio(self, gpa: int) -> bool:
        """Say whether no RAM lies at `gpa`."""

    def mmio(self, cpu: Cpu, gpa: int, size: int, write: bytes | None, modify: Callable[[bytes], bytes] | None
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


class StringIo:
    """An INS or OUTS instruction in execution.

    Parameters
    ----------
    out : bool
    size : bytes per element
    rep : bool
    """

    def __init__(self, *, out: bool, size: int, rep: bool) -> None:
        self.out = out
        self.size = size
        self.rep = rep


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
    """

    def __init__(self, vcpu_id: int, listing: Listing, memory: bytearray, hypervisor: Hypervisor,
                 registers: dict[str, int]) -> None:
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
        self.ended = False
        self.line: Line = listing.lines[0]

    @property
    def linear(self) -> int:
        """Address of the next instruction."""
        return self.cs_base + self.rip

    # registers and memory

    def get(self, name: str) -> Value:
        """Return register `name` of 8, 16 or 32 bits."""
        full, shift, bits = _locate(name)
        mask = (1 << bits) - 1
        if self.unknown.get(full, 0) >> shift & mask:
            return None
        return self.registers.get(full, 0) >> shift & mask

    def set(self, name: str, value: Value) -> None:
        """Set register `name` of 8, 16 or 32 bits."""
        full, shift, bits = _locate(name)
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
        return bytes(self.memory[gpa:gpa + size])

    def write(self, gpa: int, data: bytes) -> None:
        """Write RAM or MMIO."""
        if self.hypervisor.is_mmio(gpa):
            self.hypervisor.mmio(self, gpa, len(data), data, None)
            return
        self.hypervisor.touch(self, gpa, "write")
        self.memory[gpa:gpa + len(data)] = data

    def push(self, value: int) -> None:
        """Push a word."""
        self.set("sp", self.number("sp") - 2 & 0xFFFF)
        self.write(self.number("sp"), value.to_bytes(2, "little"))

    def pop(self) -> int:
        """Pop a word."""
        value = int.from_bytes(self.read(self.number("sp"), 2), "little")
        self.set("sp", self.number("sp") + 2 & 0xFFFF)
        return value

    # execution

    def run(self) -> Iterator[None]:
        """Execute until the guest ends; yields while it waits for an interrupt."""
        while not self.ended:
            self.line = self.lines[self.linear]
            shadow, self.shadow = self.shadow, False
            self.hypervisor.fetch(self, self.line)
            if self.line.text == "hlt":
                yield from self.hypervisor.halt(self)
            else:
                self._execute(self.line)
            assert not shadow or self.line.text == "hlt"

    def advance(self) -> None:
        """Step behind the current instruction."""
        self.rip += len(self.line.code)

    def interrupt(self, vector: int, *, return_rip: int) -> None:
        """Deliver an interrupt or exception through the real-mode vector table."""
        if vector * 4 + 3 > self.idt_limit:
            self.hypervisor.triple_fault(self)
            self.ended = True
            return
        target = int.from_bytes(self.read(vector * 4, 4), "little")
        for word in (self.flags, self.cs_base >> 4, return_rip):
            self.push(word)
        self.flags &= ~IF
        self.rip, self.cs_base = target & 0xFFFF, target >> 16 << 4

    def _execute(self, line: Line) -> None:
        name, _, rest = line.text.partition(" ")
        if string_io := _STRING_IO.match(line.text):
            size = {"b": 1, "w": 2, "d": 4}[string_io["size"]]
            access = StringIo(out=string_io["way"] == "out", size=size, rep=bool(string_io["rep"]))
            self.hypervisor.string_io(self, access)
            self.advance()
            return
        operation = _OPERATIONS[name]
        operation(self, *(part.strip() for part in rest.split(",") if part))

    def operand(self, text: str, size: int = 0) -> Value | bytes:
        """Return an operand's value: register, immediate, or memory of `size` bytes as bytes."""
        if memory := _MEMORY.fullmatch(text):
            return self.read(self.address(memory), _SIZES.get(memory["size"] or "", size))
        return self.get(text) if _is_register(text) else int(text, 0)

    def address(self, memory: re.Match[str]) -> int:
        """Return the address of a memory operand."""
        base = self.number(memory["base"]) if memory["base"] else 0
        return base + int(memory["offset"], 0) & 0xFFFF

    def store(self, text: str, value: Value, size: int) -> None:
        """Store to a register or to memory."""
        if memory := _MEMORY.fullmatch(text):
            assert value is not None, f"{self.line.text} stores a value that is not known"
            self.write(self.address(memory), value.to_bytes(size, "little"))
        else:
            self.set(text, value)


def _is_register(text: str) -> bool:
    return text[-1] in "xlhip" and text.isalpha()


def _locate(name: str) -> tuple[str, int, int]:
    """Return (name without prefix: "ax", shift, bits) of a register."""
    if name.startswith("e"):
        return name[1:], 0, 32
    if name[0] in _LETTERS and name[1] in "lh":
        return name[0] + "x", 8 if name[1] == "h" else 0, 8
    return name, 0, 16


def _size_of(*operands: str) -> int:
    """Return the operand size in bytes."""
    for text in operands:
        if memory := _MEMORY.fullmatch(text):
            if memory["size"]:
                return _SIZES[memory["size"]]
        elif _is_register(text):
            return _locate(text)[2] // 8
    raise AssertionError(operands)


def _as_number(value: Value | bytes) -> Value:
    return int.from_bytes(value, "little") if isinstance(value, bytes) else value


def _mov(cpu: Cpu, target: str, source: str) -> None:
    size = _size_of(target, source)
    cpu.store(target, _as_number(cpu.operand(source, size)), size)
    cpu.advance()


def _arithmetic(function: Callable[[int, int], int]) -> Callable[[Cpu, str, str], None]:
    def operation(cpu: Cpu, target: str, source: str) -> None:
        size = _size_of(target, source)
        if target == source and function(1, 1) == 0:  # XOR with itself: known, whatever it was
            cpu.store(target, 0, size)
            cpu.advance()
            return
        right = _as_number(cpu.operand(source, size))
        assert right is not None
        mask = (1 << 8 * size) - 1
        memory = _MEMORY.fullmatch(target)
        if memory and cpu.hypervisor.is_mmio(cpu.address(memory)):
            def modify(data: bytes) -> bytes:
                return (function(int.from_bytes(data, "little"), right) & mask).to_bytes(size, "little")

            cpu.hypervisor.mmio(cpu, cpu.address(memory), size, None, modify)
        else:
            left = _as_number(cpu.operand(target, size))
            cpu.store(target, None if left is None else function(left, right) & mask, size)
        cpu.advance()

    return operation


def _dec(cpu: Cpu, target: str) -> None:
    value = cpu.number(target) - 1
    cpu.set(target, value)
    cpu.flags = cpu.flags & ~ZF | (0 if cpu.get(target) else ZF)
    cpu.advance()


def _jne(cpu: Cpu, target: str) -> None:
    cpu.advance()
    if not cpu.flags & ZF:
        cpu.rip = int(target, 0) - cpu.cs_base


def _jmp(cpu: Cpu, target: str) -> None:
    segment, offset = (int(part, 0) for part in target.split(":"))
    cpu.cs_base, cpu.rip = segment << 4, offset


def _out(cpu: Cpu, port: str, source: str) -> None:
    size = _size_of(source)
    value = cpu.number(source)
    number = _as_number(cpu.operand(port))
    assert number is not None
    cpu.hypervisor.out_port(cpu, number, value.to_bytes(size, "little"))
    cpu.advance()


def _in(cpu: Cpu, target: str, port: str) -> None:
    number = _as_number(cpu.operand(port))
    assert number is not None
    data = cpu.hypervisor.in_port(cpu, number, _size_of(target))
    cpu.set(target, int.from_bytes(data, "little"))
    cpu.advance()


def _cpuid(cpu: Cpu) -> None:
    cpu.hypervisor.cpuid(cpu)
    for name in ("eax", "ebx", "ecx", "edx"):
        cpu.set(name, None)
    cpu.advance()


def _rdmsr(cpu: Cpu) -> None:
    value = cpu.hypervisor.rdmsr(cpu, cpu.number("ecx"))
    cpu.set("eax", None if value is None else value & 0xFFFFFFFF)
    cpu.set("edx", None if value is None else value >> 32)
    cpu.advance()


def _wrmsr(cpu: Cpu) -> None:
    low, high = cpu.get("eax"), cpu.get("edx")
    value = None if low is None or high is None else high << 32 | low
    if cpu.hypervisor.wrmsr(cpu, cpu.number("ecx"), value):
        cpu.advance()
    else:
        cpu.hypervisor.deliver(cpu, 13, exception=True)
        cpu.interrupt(13, return_rip=cpu.rip)


def _sti(cpu: Cpu) -> None:
    cpu.flags |= IF
    cpu.shadow = True
    cpu.advance()


def _cli(cpu: Cpu) -> None:
    cpu.flags &= ~IF
    cpu.advance()


def _push(cpu: Cpu, source: str) -> None:
    cpu.push(cpu.number(source))
    cpu.advance()


def _pop(cpu: Cpu, target: str) -> None:
    cpu.set(target, cpu.pop())
    cpu.advance()


def _iret(cpu: Cpu) -> None:
    rip, segment, cpu.flags = cpu.pop(), cpu.pop(), cpu.pop()
    cpu.rip, cpu.cs_base = rip, segment << 4


def _lidt(cpu: Cpu, source: str) -> None:
    table = cpu.operand(source, 6)
    assert isinstance(table, bytes)
    cpu.idt_limit = int.from_bytes(table[:2], "little")
    cpu.advance()


def _int3(cpu: Cpu) -> None:
    cpu.interrupt(3, return_rip=cpu.rip + 1)


def _movups(cpu: Cpu, target: str, source: str) -> None:
    if memory := _MEMORY.fullmatch(target):
        cpu.write(cpu.address(memory), cpu.vectors.get(source, bytes(16)))
    else:
        value = cpu.operand(source, 16)
        assert isinstance(value, bytes)
        cpu.vectors[target] = value
    cpu.advance()


def _cld(cpu: Cpu) -> None:
    cpu.advance()


_OPERATIONS: dict[str, Callable[..., None]] = {
    "mov": _mov, "movups": _movups, "add": _arithmetic(lambda a, b: a + b), "or": _arithmetic(lambda a, b: a | b),
    "xor": _arithmetic(lambda a, b: a ^ b), "dec": _dec, "jne": _jne, "jmp": _jmp, "out": _out, "in": _in,
    "cpuid": _cpuid, "rdmsr": _rdmsr, "wrmsr": _wrmsr, "sti": _sti, "cli": _cli, "cld": _cld, "push": _push,
    "pop": _pop, "iret": _iret, "lidt": _lidt, "int3": _int3,
}
