"""Puts real-mode instructions together that cause VM-exits; what a register holds already is not loaded again.

Source: Intel SDM, "Instruction Set Reference"; operand size is 16 bits, 0x66 makes it 32.
"""

from __future__ import annotations

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.workload.guests import RAM_BYTES

BEGIN, END = 0x4000, RAM_BYTES - 0x40  # of the code: the guests' memory above vectors, stack and data
HANDLERS = 0x1000  # INT n's, an IRET; and #GP's, which goes on behind RDMSR or WRMSR
GP_HANDLER, GP_VECTOR = 0x1010, 13
DATA = 0x3000
MMIO_PAGE = 0x9000  # what lies elsewhere in the recorded guest's memory is accessed there
UNKNOWN = None
_ACCUMULATOR = {1: "al", 2: "ax", 4: "eax"}


@dataclass(frozen=True)
class Placed:
    """One instruction at its address."""

    address: int
    code: bytes
    text: str
    comment: str = ""


class Program:
    """A program that grows instruction by instruction.

    Parameters
    ----------
    call : the hypercall instruction of the ISA
    """

    def __init__(self, call: bytes) -> None:
        self._call = call
        self._body: list[tuple[bytes, str, str]] = []
        self._held: dict[str, int | None] = {}
        self._vectors: dict[int, int] = {}  # vector -> its handler

    def port(self, port: int, size: int, value: int, *, out: bool) -> None:
        """Access a port once."""
        self._load("edx", port)
        if out:
            self._load("eax", value)
        name = _ACCUMULATOR[size]
        code = {(1, True): "ee", (2, True): "ef", (4, True): "66ef", (1, False): "ec", (2, False): "ed"}
        self._add(code.get((size, out), "66ed"), f"out dx, {name}" if out else f"in {name}, dx", f"port {port:#x}")
        if not out:
            self._held["eax"] = UNKNOWN

    def string_port(self, port: int, size: int, elements: int, *, out: bool) -> None:
        """Move several elements between memory and a port."""
        self._load("edx", port)
        self._load("ecx", min(elements, 0x400))
        register, opcode = ("si", 0xBE) if out else ("di", 0xBF)
        self._add(bytes((opcode, DATA & 0xFF, DATA >> 8)), f"mov {register}, {DATA:#x}")
        self._add("fc", "cld")
        letter = {1: "b", 2: "w", 4: "d"}[size]
        last = {(1, True): "f36e", (1, False): "f36c", (4, True): "66f36f", (4, False): "66f36d"}
        code = last.get((size, out), "f36f" if out else "f36d")
        self._add(code, f"rep {'outs' if out else 'ins'}{letter}", f"port {port:#x}, {elements} elements")
        self._held["ecx"] = 0

    def memory(self, gpa: int, size: int, value: int, *, write: bool) -> None:
        """Access a page without memory, at the same offset."""
        address = gpa if RAM_BYTES <= gpa < 0x10000 else MMIO_PAGE | gpa & 0xFFF
        size = size if size in _ACCUMULATOR else 4
        if write:
            self._load("eax", value & (1 << 8 * size) - 1)
        name = _ACCUMULATOR[size]
        opcode = {1: "a0", 2: "a1", 4: "66a1"}[size]
        if write:
            opcode = {1: "a2", 2: "a3", 4: "66a3"}[size]
        code = bytes.fromhex(opcode) + address.to_bytes(2, "little")
        place = f"[{address:#x}]"
        self._add(code, f"mov {place}, {name}" if write else f"mov {name}, {place}", f"gpa {gpa:#x}")
        if not write:
            self._held["eax"] = UNKNOWN

    def cpuid(self, function: int, index: int) -> None:
        """Ask for a CPUID leaf."""
        self._load("eax", function)
        if index:
            self._load("ecx", index)
        self._add("0fa2", "cpuid", f"leaf {function:#x}")
        self._held = dict.fromkeys(("eax", "ecx", "edx"), UNKNOWN)

    def msr(self, number: int, value: int, *, write: bool, faults: bool) -> None:
        """Read or write a model-specific register; one that faults needs a handler."""
        self._load("ecx", number)
        if write:
            self._load("eax", value & 0xFFFFFFFF)
            self._load("edx", value >> 32 & 0xFFFFFFFF)
        if faults:
            self._vectors[GP_VECTOR] = GP_HANDLER
        self._add("0f30" if write else "0f32", "wrmsr" if write else "rdmsr", f"MSR {number:#x}")
        if not write:
            self._held["eax"] = self._held["edx"] = UNKNOWN

    def hypercall(self, number: int) -> None:
        """Call KVM; in real mode it answers with an error or serves it."""
        self._load("eax", number)
        self._add(self._call, f"db {', '.join(f'0x{byte:02x}' for byte in self._call)}", f"hypercall {number}")
        self._held["eax"] = UNKNOWN

    def halt(self) -> None:
        """Wait; without interrupt controllers in the kernel that leaves to userspace."""
        self._add("f4", "hlt")

    def interrupt(self, vector: int) -> None:
        """Take an interrupt, raised by the guest itself."""
        self._vectors.setdefault(vector, HANDLERS)
        self._add(bytes((0xCD, vector & 0xFF)), f"int {vector & 0xFF:#x}", "arrived here")

    def finish(self, port: int) -> None:
        """End with status 0 at the exit port."""
        self._add("30c0", "xor al, al")
        self._add(bytes((0xE6, port)), f"out {port:#x}, al", "the exit port: status 0")

    @property
    def fits(self) -> bool:
        """Whether the program fits the guest's memory."""
        return BEGIN + sum(len(code) for code, _, _ in self._prologue() + self._body) <= END

    def placed(self) -> list[Placed]:
        """Return all instructions with their addresses: handlers first, then the code from `start` on."""
        rows = []
        if self._vectors:
            rows.append(Placed(HANDLERS, b"\xcf", "iret"))
        if GP_HANDLER in self._vectors.values():
            rows += _run(GP_HANDLER, _GP_RETURN)
        return rows + _run(BEGIN, self._prologue() + self._body)

    def _prologue(self) -> list[tuple[bytes, str, str]]:
        """Return what fills the vector table, and touches the stack."""
        rows = []
        for vector, handler in sorted(self._vectors.items()):
            for place, value in ((vector * 4, handler), (vector * 4 + 2, 0)):
                code = b"\xc7\x06" + place.to_bytes(2, "little") + value.to_bytes(2, "little")
                words = f"vector {vector:#x}" if value else ""
                rows.append((code, f"mov word [{place:#x}], {value:#x}", words))
        if rows:
            rows += [(b"\x55", "push bp", "touches the stack"), (b"\x5d", "pop bp", "")]
        return rows

    def _load(self, register: str, value: int) -> None:
        """Put a value into a register, unless it is there."""
        if self._held.get(register) == value:
            return
        opcode = {"eax": 0xB8, "ecx": 0xB9, "edx": 0xBA}[register]
        self._held[register] = value
        code = bytes((0x66, opcode)) + value.to_bytes(4, "little")
        self._add(code, f"mov {register}, {value:#x}")

    def _add(self, code: str | bytes, text: str, comment: str = "") -> None:
        self._body.append((bytes.fromhex(code) if isinstance(code, str) else code, text, comment))


_GP_RETURN: list[tuple[bytes, str, str]] = [
    (b"\x55", "push bp", ""),
    (b"\x89\xe5", "mov bp, sp", ""),
    (b"\x83\x46\x02\x02", "add word [bp+2], 2", "behind the instruction of two bytes"),
    (b"\x5d", "pop bp", ""),
    (b"\xcf", "iret", ""),
]


def _run(address: int, rows: list[tuple[bytes, str, str]]) -> list[Placed]:
    """Give instructions that follow one another their addresses."""
    placed = []
    for code, text, comment in rows:
        placed.append(Placed(address, code, text, comment))
        address += len(code)
    return placed
