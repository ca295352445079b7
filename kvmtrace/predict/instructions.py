"""The instructions that the bundled guests use, and the reading of their operands from a listing's text.

Each is a function of the processor (`cpu.Cpu`) and its operands as text; `execute` runs a listing with them.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from kvmtrace.isa.registry import ISAS
from kvmtrace.predict.operands import IF, ZF, StringIo, Value, locate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtrace.predict.cpu import Cpu

GP_VECTOR = 13
_MEMORY = re.compile(r"(?:(?P<size>byte|word|dword) )?\[(?:(?P<base>[a-z]+)\+)?(?P<offset>0x[0-9a-f]+|\d+)\]")
_SIZES = {"byte": 1, "word": 2, "dword": 4}
_STRING_IO = re.compile(r"(?P<rep>rep )?(?P<way>in|out)s(?P<size>[bwd])$")
_ELEMENT_BYTES = {"b": 1, "w": 2, "d": 4}


def execute(cpu: Cpu) -> Iterator[None]:
    """Execute a vCPU's listing until the guest ends; yields while it waits for an interrupt."""
    while not cpu.ended:
        cpu.line = cpu.lines[cpu.linear]
        shadow, cpu.shadow = cpu.shadow, False
        cpu.hypervisor.fetch(cpu, cpu.line)
        if cpu.level > 1 and cpu.hypervisor.passes_on(cpu):
            continue
        if cpu.line.text == "hlt":
            yield from cpu.hypervisor.halt(cpu)
        else:
            operation, operands = decode(cpu.line.text)
            operation(cpu, *operands)
        assert not shadow or cpu.line.text == "hlt"


@cache
def decode(text: str) -> tuple[Callable[..., None], tuple[str, ...]]:
    """Return the function of an instruction, and its operands.

    Raises
    ------
    KeyError
        No guest has used that instruction so far.
    """
    if string_io := _STRING_IO.match(text):
        access = StringIo(string_io["way"] == "out", _ELEMENT_BYTES[string_io["size"]], bool(string_io["rep"]))
        return lambda cpu: _string_io(cpu, access), ()
    name, _, rest = text.partition(" ")
    return _OPERATIONS[name], tuple(part.strip() for part in rest.split(",") if part)


@cache
def _memory(text: str) -> tuple[str, int, int] | None:
    """Return (base register or "", offset, bytes or 0) of a memory operand; None if it is none."""
    found = _MEMORY.fullmatch(text)
    return (found["base"] or "", int(found["offset"], 0), _SIZES.get(found["size"] or "", 0)) if found else None


def _is_register(text: str) -> bool:
    return text.isalpha()


def _address(cpu: Cpu, memory: tuple[str, int, int]) -> int:
    base, offset, _ = memory
    return (cpu.number(base) if base else 0) + offset & 0xFFFF


def _load(cpu: Cpu, text: str, size: int = 0) -> Value:
    """Return an operand's value: register, immediate, or memory of `size` bytes."""
    if memory := _memory(text):
        return int.from_bytes(cpu.read(_address(cpu, memory), memory[2] or size), "little")
    return cpu.get(text) if _is_register(text) else int(text, 0)


def _store(cpu: Cpu, text: str, value: Value, size: int) -> None:
    """Store to a register or to memory."""
    if memory := _memory(text):
        assert value is not None, f"{cpu.line.text} stores a value that is not known"
        cpu.write(_address(cpu, memory), value.to_bytes(size, "little"))
    else:
        cpu.set(text, value)


def _size_of(*operands: str) -> int:
    """Return the operand size in bytes."""
    for text in operands:
        memory = _memory(text)
        if memory is not None and memory[2]:
            return memory[2]
        if memory is None and _is_register(text):
            return locate(text)[2] // 8
    raise AssertionError(operands)


def _string_io(cpu: Cpu, access: StringIo) -> None:
    cpu.hypervisor.string_io(cpu, access)
    cpu.advance()


def _mov(cpu: Cpu, target: str, source: str) -> None:
    size = _size_of(target, source)
    _store(cpu, target, _load(cpu, source, size), size)
    cpu.advance()


def _arithmetic(function: Callable[[int, int], int]) -> Callable[[Cpu, str, str], None]:
    def operation(cpu: Cpu, target: str, source: str) -> None:
        size = _size_of(target, source)
        if target == source and function(1, 1) == 0:  # XOR with itself: known, whatever it was
            _store(cpu, target, 0, size)
            cpu.advance()
            return
        right = _load(cpu, source, size)
        assert right is not None
        mask = (1 << 8 * size) - 1
        memory = _memory(target)
        if memory and cpu.hypervisor.is_mmio(_address(cpu, memory)):

            def modify(data: bytes) -> bytes:
                return (function(int.from_bytes(data, "little"), right) & mask).to_bytes(size, "little")

            cpu.hypervisor.mmio(cpu, _address(cpu, memory), size, None, modify)
        else:
            left = _load(cpu, target, size)
            _store(cpu, target, None if left is None else function(left, right) & mask, size)
        cpu.advance()

    return operation


def _dec(cpu: Cpu, target: str) -> None:
    value = cpu.number(target) - 1
    cpu.set(target, value)
    cpu.flags = cpu.flags & ~ZF | (0 if cpu.get(target) else ZF)
    cpu.advance()


def _jump_if(*, zero: bool) -> Callable[[Cpu, str], None]:
    def operation(cpu: Cpu, target: str) -> None:
        cpu.advance()
        if bool(cpu.flags & ZF) == zero:
            cpu.rip = int(target, 0) - cpu.cs_base

    return operation


def _jmp(cpu: Cpu, target: str) -> None:
    segment, offset = (int(part, 0) for part in target.split(":"))
    cpu.cs_base, cpu.rip = segment << 4, offset


def _out(cpu: Cpu, port: str, source: str) -> None:
    size = _size_of(source)
    value = cpu.number(source)
    number = _load(cpu, port)
    assert number is not None
    cpu.hypervisor.out_port(cpu, number, value.to_bytes(size, "little"))
    cpu.advance()


def _in(cpu: Cpu, target: str, port: str) -> None:
    number = _load(cpu, port)
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
        cpu.hypervisor.deliver(cpu, GP_VECTOR, exception=True)
        cpu.interrupt(GP_VECTOR, return_rip=cpu.rip)


def _sti(cpu: Cpu) -> None:
    cpu.flags |= IF
    cpu.shadow = True
    cpu.advance()


def _cli(cpu: Cpu) -> None:
    cpu.flags &= ~IF
    cpu.advance()


def _push(cpu: Cpu, source: str) -> None:
    cpu.push(cpu.number(source), _size_of(source))
    cpu.advance()


def _pop(cpu: Cpu, target: str) -> None:
    cpu.set(target, cpu.pop(_size_of(target)))
    cpu.advance()


def _iret(cpu: Cpu) -> None:
    flat = cpu.line.bits == 32
    size = 4 if flat else 2
    rip, segment, cpu.flags = cpu.pop(size), cpu.pop(size), cpu.pop(size)
    cpu.rip, cpu.cs_base = rip, 0 if flat else segment << 4
    if flat:  # the code segment is looked up
        cpu.read(cpu.gdt_base + (segment & ~7), 8)


def _lidt(cpu: Cpu, source: str) -> None:
    table = _load(cpu, source, 6)  # limit of 2 bytes, base of 4
    assert table is not None
    cpu.idt_limit = table & 0xFFFF
    cpu.advance()


def _int3(cpu: Cpu) -> None:
    cpu.interrupt(3, return_rip=cpu.rip + 1)


def _movups(cpu: Cpu, target: str, source: str) -> None:
    if memory := _memory(target):
        cpu.write(_address(cpu, memory), cpu.vectors.get(source, bytes(16)))
    elif memory := _memory(source):
        cpu.vectors[target] = cpu.read(_address(cpu, memory), 16)
    cpu.advance()


def _for_hypervisors(name: str) -> Callable[..., None]:
    return lambda cpu, *operands: cpu.hypervisor.for_hypervisors(cpu, name, operands)


def _cld(cpu: Cpu) -> None:
    cpu.advance()


# fmt: off
_OPERATIONS: dict[str, Callable[..., None]] = {
    "mov": _mov, "movups": _movups, "add": _arithmetic(lambda a, b: a + b), "or": _arithmetic(lambda a, b: a | b),
    "xor": _arithmetic(lambda a, b: a ^ b), "dec": _dec, "jne": _jump_if(zero=False), "je": _jump_if(zero=True),
    "jmp": _jmp, "out": _out, "in": _in,
    "cpuid": _cpuid, "rdmsr": _rdmsr, "wrmsr": _wrmsr, "sti": _sti, "cli": _cli, "cld": _cld, "push": _push,
    "pop": _pop, "iret": _iret, "lidt": _lidt, "int3": _int3,
    **{name: _for_hypervisors(name) for isa in ISAS if isa.nesting is not None and isa.nesting.entry is not None
       for name in isa.nesting.entry.instructions},
}
# fmt: on
