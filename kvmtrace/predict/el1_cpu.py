"""A processor that executes the listing of an arm64 guest: EL1 with the MMU off, the few instructions the guests use.

It knows what the guest's instructions do, not what a hypervisor makes of them: what could leave guest mode calls the
`Arm64Hypervisor`, which writes down the events KVM will trace (`virt_machine.py`). A value of None is one that the
listing does not tell (what an identification register holds).
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Protocol

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtrace.workload.listing import Line, Listing

    Value = int | None

INSTRUCTION_BYTES = 4
ZERO = 31  # number of the zero register
IRQ_VECTOR, SYNCHRONOUS_VECTOR = 0x280, 0x200  # from EL1 with its own stack pointer
SPURIOUS = 1023
_REGISTER = re.compile(r"(?P<width>[xw])(?P<number>\d+|zr)")
_MEMORY = re.compile(r"\[(?P<base>\w+)(?:, #(?P<offset>-?(?:0x)?[0-9a-f]+))?\]")
_LOAD_STORE = re.compile(r"(?P<way>ld|st)(?P<pair>p)?r?(?P<sign>s)?(?P<size>[bhw])?$")
_SIZES = {"b": 1, "h": 2, "w": 4}


@dataclass(frozen=True)
class Transfer:
    """A load or store.

    Parameters
    ----------
    write : bool
    size : bytes of the access, of one register of a pair
    register : number of the (first) general register
    signed : a load that extends the sign
    sixty_four : a load that fills 64 bits
    pair : of two registers, which no syndrome describes
    """

    write: bool
    size: int
    register: int
    signed: bool
    sixty_four: bool
    pair: bool


class Arm64Hypervisor(Protocol):
    """What the processor tells of; each call stands for one architectural event of the vCPU `cpu`."""

    def fetch(self, cpu: Arm64Cpu, line: Line) -> None:
        """Begin the instruction at cpu.pc."""

    def is_mmio(self, gpa: int) -> bool:
        """Say whether no RAM lies at `gpa`."""

    def touch(self, cpu: Arm64Cpu, gpa: int, access: str) -> None:
        """Access RAM at `gpa`; access is "read" or "write"."""

    def mmio(self, cpu: Arm64Cpu, gpa: int, transfer: Transfer, value: Value) -> Value:
        """Load or store where no RAM is; return what a load reads."""

    def system_register(self, cpu: Arm64Cpu, name: str, register: int, value: Value, *, write: bool) -> Value:
        """Read or write a system register that the processor does not keep by itself; return what is read."""

    def wait(self, cpu: Arm64Cpu) -> Iterator[None]:
        """Execute WFI; yields for as long as no interrupt is pending."""

    def acknowledge(self, cpu: Arm64Cpu) -> int:
        """Return the pending interrupt, which becomes active; SPURIOUS if there is none."""

    def has_interrupt(self, cpu: Arm64Cpu) -> bool:
        """Say whether an interrupt is pending."""

    def call(self, cpu: Arm64Cpu, *, secure: bool) -> None:
        """Execute HVC or SMC."""


class Arm64Cpu:
    """One vCPU.

    Parameters
    ----------
    vcpu_id : int
    listing : the guest's code
    memory : RAM, shared by all vCPUs
    hypervisor : is told of what could leave guest mode
    registers : "x0" ... "x30", "pc" -> values at the first instruction

    Attributes
    ----------
    system : system registers that the processor keeps by itself, by name
    masked : interrupts are masked, as after reset
    """

    def __init__(
        self,
        vcpu_id: int,
        listing: Listing,
        memory: bytearray,
        hypervisor: Arm64Hypervisor,
        registers: dict[str, int],
    ) -> None:
        self.vcpu_id = vcpu_id
        self.memory = memory
        self.hypervisor = hypervisor
        self.lines = {line.address: line for line in listing.lines if not line.is_data}
        self.x: list[Value] = [registers.get(f"x{number}", 0) for number in range(31)]
        self.pc = registers.get("pc", 0)
        self.system: dict[str, int] = {}
        self.zero = False
        self.masked = True
        self.ended = False
        self.line: Line = listing.lines[0]

    def get(self, name: str) -> Value:
        """Return a general register's value: "x3", "w3" or "xzr"."""
        found = _register(name)
        value = 0 if found[0] == ZERO else self.x[found[0]]
        return value if value is None else value & (1 << found[1]) - 1

    def set(self, name: str, value: Value) -> None:
        """Set a general register; one of 32 bits clears the others."""
        number, bits = _register(name)
        if number != ZERO:
            self.x[number] = value if value is None else value & (1 << bits) - 1

    def number(self, name: str) -> int:
        """Return a register whose value the listing must tell."""
        value = self.get(name)
        assert value is not None, f"{name} is not known at {self.line.address:#x}"
        return value

    def run(self) -> Iterator[None]:
        """Execute until the guest ends; yields while it waits for an interrupt."""
        while not self.ended:
            if not self.masked and self.hypervisor.has_interrupt(self):
                self.enter_exception(IRQ_VECTOR)
            self.line = self.lines[self.pc]
            self.hypervisor.fetch(self, self.line)
            if self.line.text == "wfi":
                yield from self.hypervisor.wait(self)
                self.pc += INSTRUCTION_BYTES
            else:
                name, _, rest = self.line.text.partition(" ")
                _operation(name)(self, *_operands(rest))

    def enter_exception(self, vector: int) -> None:
        """Take an exception to EL1."""
        self.system["elr_el1"], self.system["spsr_masked"] = self.pc, int(self.masked)
        self.masked = True
        self.pc = self.system["vbar_el1"] + vector

    def return_from_exception(self) -> None:
        """Execute ERET."""
        self.pc, self.masked = self.system["elr_el1"], bool(self.system["spsr_masked"])


@cache
def _register(name: str) -> tuple[int, int]:
    """Return (number, bits) of a general register's name."""
    found = _REGISTER.fullmatch(name)
    assert found is not None, name
    number = ZERO if found["number"] == "zr" else int(found["number"])
    return number, 64 if found["width"] == "x" else 32


@cache
def _operands(text: str) -> tuple[str, ...]:
    """Split at the commas that stand in no brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip())


@cache
def _immediate(text: str) -> int:
    return int(text.removeprefix("#"), 0)


def _is_register(text: str) -> bool:
    return _REGISTER.fullmatch(text) is not None


def _next(cpu: Arm64Cpu) -> None:
    cpu.pc += INSTRUCTION_BYTES


def _mov(cpu: Arm64Cpu, target: str, source: str) -> None:
    cpu.set(target, cpu.get(source) if _is_register(source) else _immediate(source))
    _next(cpu)


def _movk(cpu: Arm64Cpu, target: str, value: str, shift: str = "lsl #0") -> None:
    at = _immediate(shift.removeprefix("lsl "))
    cpu.set(target, cpu.number(target) & ~(0xFFFF << at) | _immediate(value) << at)
    _next(cpu)


def _add(cpu: Arm64Cpu, target: str, left: str, right: str) -> None:
    cpu.set(target, cpu.number(left) + _immediate(right))
    _next(cpu)


def _subs(cpu: Arm64Cpu, target: str, left: str, right: str) -> None:
    cpu.set(target, cpu.number(left) - _immediate(right))
    cpu.zero = cpu.number(target) == 0
    _next(cpu)


def _bne(cpu: Arm64Cpu, target: str) -> None:
    cpu.pc = cpu.pc + INSTRUCTION_BYTES if cpu.zero else _immediate(target)


def _cbz(cpu: Arm64Cpu, register: str, target: str) -> None:
    cpu.pc = cpu.pc + INSTRUCTION_BYTES if cpu.number(register) else _immediate(target)


def _bl(cpu: Arm64Cpu, target: str) -> None:
    cpu.set("x30", cpu.pc + INSTRUCTION_BYTES)
    cpu.pc = _immediate(target)


def _ret(cpu: Arm64Cpu) -> None:
    cpu.pc = cpu.number("x30")


def _eret(cpu: Arm64Cpu) -> None:
    cpu.return_from_exception()


def _transfer(name: str, registers: tuple[str, ...]) -> Transfer:
    found = _LOAD_STORE.match(name)
    assert found is not None, name
    number, bits = _register(registers[0])
    size = _SIZES[found["size"]] if found["size"] else bits // 8
    return Transfer(found["way"] == "st", size, number, bool(found["sign"]), bits == 64, bool(found["pair"]))


def _load_store(name: str) -> Callable[..., None]:
    def operation(cpu: Arm64Cpu, *operands: str) -> None:
        *registers, memory = operands
        transfer = _transfer(name, tuple(registers))
        found = _MEMORY.fullmatch(memory)
        assert found is not None, memory
        gpa = cpu.number(found["base"]) + _immediate(found["offset"] or "0")
        if cpu.hypervisor.is_mmio(gpa):
            read = cpu.hypervisor.mmio(cpu, gpa, transfer, cpu.get(registers[0]) if transfer.write else None)
            if not transfer.write:
                for register in registers:
                    cpu.set(register, read)
        else:
            _ram(cpu, gpa, transfer, registers[0])
        _next(cpu)

    return operation


def _ram(cpu: Arm64Cpu, gpa: int, transfer: Transfer, register: str) -> None:
    cpu.hypervisor.touch(cpu, gpa, "write" if transfer.write else "read")
    end = gpa + transfer.size
    if transfer.write:
        cpu.memory[gpa:end] = (cpu.number(register) & (1 << 8 * transfer.size) - 1).to_bytes(transfer.size, "little")
    else:
        cpu.set(register, int.from_bytes(cpu.memory[gpa:end], "little", signed=transfer.signed))


def _mrs(cpu: Arm64Cpu, target: str, name: str) -> None:
    if name == "icc_iar1_el1":
        cpu.set(target, cpu.hypervisor.acknowledge(cpu))
    elif name in cpu.system:
        cpu.set(target, cpu.system[name])
    else:
        before = cpu.pc
        value = cpu.hypervisor.system_register(cpu, name, _register(target)[0], None, write=False)
        if cpu.pc != before:  # it raised an exception
            return
        cpu.set(target, value)
    _next(cpu)


def _msr(cpu: Arm64Cpu, name: str, source: str) -> None:
    if name in {"daifset", "daifclr"}:
        cpu.masked = name == "daifset"
    elif name in {"vbar_el1", "elr_el1"}:
        cpu.system[name] = cpu.number(source)
    else:
        cpu.hypervisor.system_register(cpu, name, _register(source)[0], cpu.get(source), write=True)
    _next(cpu)


def _call(secure: bool) -> Callable[..., None]:
    def operation(cpu: Arm64Cpu, _immediate: str) -> None:
        cpu.hypervisor.call(cpu, secure=secure)
        _next(cpu)

    return operation


# fmt: off
_OPERATIONS: dict[str, Callable[..., None]] = {
    "mov": _mov, "movk": _movk, "add": _add, "subs": _subs, "b.ne": _bne, "cbz": _cbz, "bl": _bl, "ret": _ret,
    "eret": _eret, "mrs": _mrs, "msr": _msr, "isb": _next, "hvc": _call(secure=False), "smc": _call(secure=True),
}
# fmt: on


@cache
def _operation(name: str) -> Callable[..., None]:
    """Return the function of an instruction.

    Raises
    ------
    KeyError
        No guest has used that instruction so far.
    """
    return _load_store(name) if _LOAD_STORE.match(name) else _OPERATIONS[name]
