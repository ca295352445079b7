"""A bundled hypervisor (L1) enters and leaves its guest (L2), told what it wants by fields.

Where the fields are, in memory or behind instructions, is the ISA's (`NestedEntry`). The processor is the same; of its
registers, those that are fields change with the level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.predict.story import Expected

if TYPE_CHECKING:
    from kvmtrace.isa.base import Nesting
    from kvmtrace.isa.nested_entry import NestedEntry
    from kvmtrace.predict.cpu import Cpu
    from kvmtrace.predict.predicted_steps import Story

VALID, VECTOR = 1 << 31, 0xFF  # of an event to be injected
DIVIDE_ERROR, BREAKPOINT = 0, 3
# instruction -> kind of its exit, and the vector of the exception that it raises
EXITS: dict[str, tuple[str, int]] = {
    "cpuid": ("cpuid", 0),
    "hlt": ("halt", 0),
    "div al": ("exception", DIVIDE_ERROR),  # the guests divide by 0
    "int3": ("exception", BREAKPOINT),
}
_SAVED = ("ip", "flags", "sp", "ax")


class NestedGuest:
    """The guest of one vCPU's hypervisor.

    Parameters
    ----------
    nesting, entry : of the ISA
    story : of the vCPU
    """

    def __init__(self, nesting: Nesting, entry: NestedEntry, story: Story) -> None:
        self._nesting = nesting
        self._how = entry
        self._story = story
        self._address = 0  # of the structure in memory
        self._values: dict[int, int] = {}  # of fields behind instructions
        self._host: dict[str, int] = {}  # L1's registers while L2 runs

    def leaves(self, cpu: Cpu, name: str, operands: tuple[str, ...]) -> bool:
        """Say whether an instruction of L1 leaves guest mode: the processor may know some fields itself."""
        how = self._how
        if not self._story.facts.shadowed or name not in {how.reads, how.writes}:
            return True
        number = cpu.number(operands[name == how.reads])
        return number not in how.shadowed or (name == how.writes and not how.shadowed[number])

    def execute(self, cpu: Cpu, name: str, operands: tuple[str, ...]) -> None:
        """Do what an instruction of L1 does; its exit is told already."""
        how = self._how
        following = cpu.rip + len(cpu.line.code)
        if name in how.enters:
            self._enter(cpu, following)
            return
        if name == how.writes:
            self._values[cpu.number(operands[0])] = cpu.number(operands[1])
        elif name == how.reads:
            cpu.set(operands[0], self._values.get(cpu.number(operands[1]), 0))
        cpu.rip = following

    def _enter(self, cpu: Cpu, following: int) -> None:
        """Enter L2, or refuse to."""
        own, cpu.rip = cpu.rip, following
        self._address = cpu.get("eax") or 0
        name, legal = self._how.refuses
        if self._read(cpu, name) not in legal:
            self._story.add("kvm_nested_vmenter_failed", why=f"{name} is illegal: L1 finds its entry refused")
            return
        event = self._read(cpu, "event") & 0xFFFFFFFF
        self._story.add(
            "kvm_nested_vmenter",
            Expected("rip", following if self._nesting.skips_entry else own),
            Expected("nested_rip", self._read(cpu, "ip")),
            Expected("event_inj", event),
            why="L1 enters its guest",
        )
        if self._how.structure:
            asked = [Expected(name, self._read(cpu, name)) for name in self._asked()]
            self._story.add("kvm_nested_intercepts", *asked, why="what L1 asks for")
        self._host = {"ip": following, "flags": cpu.flags, "sp": cpu.number("esp"), "ax": self._address}
        cpu.level = self._story.level = 2
        cpu.idt_base, cpu.gdt_base = self._read(cpu, "idt"), self._read(cpu, "gdt")
        self._load(cpu, {name: self._read(cpu, name) for name in _SAVED})
        if event & VALID:
            self._story.enter(cpu.rip)
            cpu.interrupt(event & VECTOR, return_rip=cpu.rip)

    def passes_on(self, cpu: Cpu) -> bool:
        """Say whether L1 gets the exit of this instruction of L2; if so, L1 goes on."""
        if cpu.level == 1 or cpu.line.text not in EXITS:
            return False
        kind, vector = EXITS[cpu.line.text]
        number = self._story.number_of(kind, vector)
        if not self._wants(cpu, number, vector if kind == "exception" else 0):
            return False
        self._story.exit(kind, cpu.rip, vector=vector)
        now = {"ip": cpu.rip, "flags": cpu.flags, "sp": cpu.number("esp"), "ax": cpu.get("eax") or 0}
        for name, value in now.items():
            self._write(cpu, name, value)
        self._write(cpu, "length", len(cpu.line.code))
        cpu.level = self._story.level = 1
        cpu.idt_base = cpu.gdt_base = 0
        if not self._how.structure:  # the processor forgets what it has injected, and L1 goes on where it said
            self._write(cpu, "event", self._read(cpu, "event") & ~VALID)
            self._host = {"ip": self._read(cpu, "host_ip"), "flags": 2, "sp": self._read(cpu, "host_sp")}
        self._load(cpu, self._host)
        self._story.add("kvm_nested_vmexit_inject", Expected("exit_code", number), why="L1 asked for it")
        return True

    def _wants(self, cpu: Cpu, number: int, vector: int) -> bool:
        """Say whether L1 gets such an exit."""
        if number in self._nesting.given:
            return True
        field, bit = self._how.asked[number]
        return bool(self._read(cpu, field) >> (bit or vector) & 1)

    def _asked(self) -> list[str]:
        fields = dict.fromkeys(field for field, _ in self._how.asked.values())
        return [field for field in fields if field in self._how.structure]

    def _load(self, cpu: Cpu, values: dict[str, int]) -> None:
        cpu.rip, cpu.flags = values["ip"], values["flags"]
        cpu.set("esp", values["sp"])
        if "ax" in self._how.structure:
            cpu.set("eax", values["ax"])

    def _read(self, cpu: Cpu, name: str) -> int:
        """Read a field as the host does: it meets no page fault."""
        if name in self._how.numbers:
            return self._values.get(self._how.numbers[name], 0)
        offset, size = self._how.structure.get(name, (0, 0))
        at = self._address + offset
        return int.from_bytes(cpu.memory[at : at + size], "little")

    def _write(self, cpu: Cpu, name: str, value: int) -> None:
        if name in self._how.numbers:
            self._values[self._how.numbers[name]] = value
        elif name in self._how.structure:
            offset, size = self._how.structure[name]
            at = self._address + offset
            cpu.memory[at : at + size] = value.to_bytes(size, "little")
