"""What an instruction-set architecture (ISA) is to kvmtrace: one value, of rows, sets, layouts and names.

`vmx.py` and `svm.py` hold one `Isa` each; `registry.py` lists them. Everything else asks the value: no code outside
this package names a vendor, an exit number or a bit position. An exit reason is one row of one of these files.
"""

from __future__ import annotations

import enum
from dataclasses import field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmtrace.isa.nested_entry import NestedEntry
    from kvmtrace.isa.words import AbortAccess, CrAccess, DrAccess, IoAccess, RegisterAccess


class RipClass(enum.Enum):
    """Where the guest continues after an in-kernel resume (kvm-lifecycle: RIP classes)."""

    SAME = "S"  # entry.rip == exit.rip
    ADVANCE = "A"  # entry.rip == exit.rip + length of the instruction
    EMULATED = "E"  # by the emulator, if there is a kvm_emulate_insn; else the same instruction again
    TRAP = "T"  # trap-like: the hardware already advanced, KVM adds nothing
    ANY = "N"  # not predictable
    PENDING = "P"  # entry.rip == exit.rip: a step or an exception is still to be carried out, as the guest is entered
    NEVER = "-"  # never resumes in the kernel


VALID, EVENT_TYPE = 1 << 31, 0x700  # of interruption information: whether it says anything, and of what type of event

# Sets of VM-exits that rules, statistics and predictions ask for: an exit row names those it belongs to.
# fmt: off
EXIT_KINDS: Mapping[str, str] = MappingProxyType({
    "exception": "an exception of the guest, or an NMI of the host",
    "undefined_opcode": "#UD, with which guests also ask for emulation (kvm.force_emulation_prefix)",
    "external_interrupt": "an interrupt of the host",
    "triple_fault": "the guest shut down",
    "interrupt_window": "the guest can take interrupts again",
    "host": "the host, or an open window, caused it at a moment that no listing of the guest tells",
    "asynchronous": "no instruction of the guest causes it: repetition at one RIP means nothing",
    "forced": "may come first after an entry marked [immediate exit]",
    "task_switch": "a hardware task switch",
    "cpuid": "CPUID",
    "halt": "the vCPU waits for an interrupt",
    "port_io": "an access to an I/O port",
    "msr": "an access to a model-specific register",
    "msr_read": "a read of a model-specific register, as far as the exit code tells",
    "msr_write": "a write of a model-specific register, as far as the exit code tells",
    "nested_entry": "the guest is a hypervisor and enters its own guest",
    "fast_path": "may be handled and re-entered with interrupts off (5.10: without a new kvm_entry)",
    "hardware_eoi": "the processor began the end of an interrupt itself",
    "second_level_fault": "the second-level page table does not map or allow the access",
    "known_mmio": "an access to a page that is known to be MMIO",
    "memory_fault": "a page fault of either level: the instruction may be tried again",
    "virtual_fault": "a page fault whose address is a virtual one (shadow paging)",
    "interrupts_delivery": "may interrupt the delivery of an event and still be handled in the kernel",
    "encrypted": "the guest hides its registers, RIP among them",
})
# fmt: on


@dataclass(frozen=True)
class Must:
    """One of `events` must follow the VM-exit before the vCPU enters the guest or leaves to userspace.

    Parameters
    ----------
    events : alternatives, kernel tracepoint names
    count : how often ("exactly 1" is (1, 1)); max None is unbounded
    unless : conditions that lift the duty, names of the model's PREDICATES: "exception" (a kvm_inj_exception
        in the segment), "userspace" (the exit leaves to userspace), "interrupted" (-EINTR), "retry", ...
    """

    events: tuple[str, ...]
    count: tuple[int, int | None] = (1, 1)
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExitRow:
    """All that is known of one exit reason.

    Parameters
    ----------
    code : int, the number in kvm_exit, without flags (see Isa.code_mask)
    name : str, verbatim as the kernel prints it; "" for a number that the kernel has no name for
    handler : str, KVM's function, with its file: "handle_io (vmx/vmx.c)"
    rip : RipClass of an in-kernel resume
    length : int, nominal (shortest) instruction length for RipClass.ADVANCE, else 0
    longest : int, bytes of the longest usual encoding, without superfluous prefixes; 0 if there is none
    kinds : names of EXIT_KINDS
    in_kernel : bool, the exit can be handled without leaving to userspace
    userspace : frozenset of KVM_EXIT_* numbers that this exit itself may cause (beyond those that may
        follow any exit, see Isa.any_exit_causes)
    must, may : follow-up events; every tracked follow-up event that is in neither is forbidden (V13)
    checks : names of payload rules that apply (V5), e.g. "emulated_rip"
    rip_when : (predicate, RipClass) pairs; the first predicate that holds replaces `rip`. An emulated
        instruction (kvm_emulate_insn) follows RipClass.EMULATED whatever stands here
    source : str, kernel function and file, or the reference manual's section name
    note : str, one sentence for people who learn
    """

    code: int
    name: str
    handler: str
    rip: RipClass
    length: int = 0
    longest: int = 0
    kinds: tuple[str, ...] = ()
    in_kernel: bool = True
    userspace: frozenset[int] = frozenset()
    must: tuple[Must, ...] = ()
    may: frozenset[str] = frozenset()
    checks: tuple[str, ...] = ()
    source: str = ""
    note: str = field(default="", compare=False)
    rip_when: tuple[tuple[str, RipClass], ...] = ()


@dataclass(frozen=True)
class SwitchStep:
    """One step of the world switch.

    Parameters
    ----------
    phase : str, one of PHASES
    title : str, a few words
    kvm : str, what KVM's code does; "" if the processor acts alone
    hardware : str, what the processor does by itself; "" if nothing
    fields : fields of the vCPU's control structure that are read or written, by the kernel's names
    function : str, kernel function and file
    after, before : recorded events between which the step lies: the last before it, the first behind it; "a|b" where
        kernels differ
    """

    phase: str
    title: str
    kvm: str
    hardware: str
    fields: tuple[str, ...]
    function: str
    after: str
    before: str


@dataclass(frozen=True)
class Nesting:
    """What is known of VM-exits that a nested guest (L2) takes, and of their reflection to the guest hypervisor (L1).

    Parameters
    ----------
    kept : codes that KVM handles first, whatever L1 asks for -> the event without which L1 does not get the exit all
        the same; "" where no event tells
    given : codes that L1 always gets
    hidden : codes that L1 never gets
    may_be_given : codes that L1 gets if a bitmap of its own says so, and never if `intercepts` says no
    invented : codes that L1 may get although the exit was another one -> the event without which it does not; ""
    unasked : codes that L1 may get without having asked, although `intercepts` has them
    intercepts : code -> (field of kvm_nested_intercepts, bit): whether L1 asked for it
    unless : code -> beginning of the names of events that show why KVM kept it
    reflected_info : field of kvm_nested_vmexit_inject -> the field of kvm_exit that it repeats, when KVM reflects the
        exit as it is
    carried_field : field of kvm_nested_vmexit_inject that says which delivery the exit interrupted
    never_carries : codes, and of exceptions vectors, that by definition interrupted no delivery
    taken_field : field of kvm_nested_vmexit_inject with the interrupt that L1 has acknowledged by its exit; "": L1 has
        to take it itself
    skips_entry : the event of the nested entry tells the RIP behind the instruction, not its own
    returns : L1 goes on at the RIP that the event of the nested entry told; else where it wrote before (`rewrites`)
    rewrites : codes of exits by which L1 may change where it goes on
    unnamed : codes that may be handled in the run function, before KVM names the exit as L2's
    exceptions : code of an exception's exit, or of that of vector 0 where each vector has a code of its own
    entry : how L1 enters L2, for predictions
    sources : name of each table above -> the kernel's functions that it comes from, with their files and versions
    source_reflects, source_reenters : KVM's functions with their files
    """

    kept: Mapping[int, str]
    given: frozenset[int]
    invented: Mapping[int, str]
    reflected_info: Mapping[str, str]
    carried_field: str
    source_reflects: str
    source_reenters: str
    hidden: frozenset[int] = frozenset()
    may_be_given: frozenset[int] = frozenset()
    unasked: frozenset[int] = frozenset()
    intercepts: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    unless: Mapping[int, str] = field(default_factory=dict)
    never_carries: frozenset[int] = frozenset()
    taken_field: str = ""
    skips_entry: bool = False
    returns: bool = False
    rewrites: frozenset[int] = frozenset()
    unnamed: frozenset[int] = frozenset()
    exceptions: int = 0
    entry: NestedEntry | None = None
    sources: Mapping[str, str] = field(default_factory=dict)


WHOLE = 0xFFFFFFFFFFFFFFFF  # all bits of a field


@dataclass(frozen=True)
class Part:
    """A piece of a value that recorded fields make up: (field & mask) << shift, a negative shift being to the right."""

    field: str
    shift: int = 0
    mask: int = WHOLE


@dataclass(frozen=True, eq=False)
class Isa:
    """An instruction-set architecture, as KVM's trace events show it.

    Numbers that a VM-exit carries are given as ints or as columns (ndarray of uint64); the `decode_*` functions
    and the methods of this class take and return either.

    Parameters
    ----------
    name : str, short, as users type it: "vmx"
    number : int below 256, what kvm_exit's field `isa` holds; 128 and above is ours, for architectures whose kvm_exit
        has no such field
    title : str, for people
    module : str, the kernel module that implements it
    rows : one ExitRow per exit reason
    other_names : numbers that the kernel names and no vCPU of the model ever leaves with
    aliases : further spellings of exit reasons in text -> their number
    prefix, prefixed_words : how trace-cmd's plug-in spells an exit reason of this ISA, if in a way of its own: what
        it puts before the name, and its words for some of them
    code_mask : the bits of the recorded number that are the exit's code; the others are flags
    flag_names : flag bit -> its name, as the kernel prints it behind the reason
    failed_entry_bit, failed_entry_code : how the number says that the VM-entry itself failed; 0 and None: in no way
    bus_lock_bit : flag of the number that says that the guest took a bus lock; 0 if there is none
    hexadecimal : codes are written in hexadecimal, as in the reference manual

    signature : fields of kvm_exit that make a recording one of this ISA where no field `isa` tells
    derived : (event, name used in kvmtrace) -> the recorded fields that it is made of, for an ISA whose events call
        things differently. The names used are those of x86: exit_reason, guest_rip and vcpu_id of kvm_exit, rip and
        vcpu_id of kvm_entry
    exit_intr_info : kvm_exit.intr_info says which event caused the exit
    vectoring_field : field of kvm_exit that says whose delivery the exit interrupted; "" if none does
    vectoring_refused : an interrupted delivery is an internal error but for exits that `interrupts_delivery`
    fault_address_field : field of kvm_exit with the guest-physical address of a second-level fault; "" if none has it
    next_rip_field : field of kvm_exit with the RIP behind a port access; "" if none has it
    event_types : type number of interruption information -> words

    decode_io, decode_cr, decode_dr : (exit code, kvm_exit.info1) -> the access; None: no such exits
    decode_msr_write : (exit code, kvm_exit.info1) -> whether the access is a write
    encode_io, encode_msr, encode_fault : the inverse, for predictions: (an access; whether it is a write; "read",
        "write", "fetch" or another word of the access) -> kvm_exit.info1, and of an access or fault also which bits
        of it are known
    describe_fault : kvm_exit.info1 of a second-level fault -> words
    classify_fault : the same -> "unmapped", "refused" (mapped, but not for this access), "device" (known to be MMIO)
        or "" (it does not tell)
    never_told : exit numbers (ints or columns) -> whether no kernel can trace them; None: nothing is known
    syndrome_code : the syndrome that a follow-up carries -> the exit code that goes with it; None: none carries one
    decode_abort, decode_trap : such a syndrome -> the access to memory, to a system register
    describe_syndrome : such a syndrome -> words
    describe_register : number of a system register, as kvm_handle_sys_reg's derived field `register` has it -> its name

    run_function : KVM's function around the world switch, which the recorder probes; "" if there is none to probe
    run_flags : where that function's first argument leads to the guest's RFLAGS, as kprobe events write it, members of
        KVM's structures in braces; "" if there are none
    run_source : that function with its file
    late_exit : which kernels trace kvm_exit with interrupts on, in words; "" if none does
    control_structure : what holds the guest's state: "VMCS"
    vcpu_object : what kvm_arch_vcpu_create allocates
    follow_ups : events that handlers of VM-exits trace on the guest's behalf, see model.states
    bystanders : consequences that may follow any exit
    untraced : events that every KVM describes and this one never traces: their absence proves nothing
    absent : events, and fields ("event.field"), that no kernel of this ISA has: what needs them does not apply to it
    any_exit_causes : KVM_EXIT_* that may follow any exit -> the request or state that causes it
    bus_lock_userspace : KVM_EXIT_* that a bus lock causes, whatever the exit
    world_switch : its steps, in order
    brackets : (event, the next one, what lies between): the intervals of the world switch that a recording can time
    unseen : what no recording shows of the world switch

    nesting : what is known of guests in its guests; None: KVM has none

    early_exit_field : every kernel whose kvm_exit has this field traces it with interrupts off; "": no field tells
    decodes_to_skip : processors exist that do not tell the next RIP, so that KVM decodes an instruction to skip it
    soft_events_move_rip : KVM moves RIP itself to inject INT n, INT3, INTO; such an event may also be executed again
    emulates_real_mode : hosts exist whose guests in real mode KVM emulates, interrupts included
    hypercall : the instruction by which a guest calls KVM; b"" if no guest of ours can be written for it
    resets_fpu : INIT puts and loads the FPU within KVM_RUN (hosts with MPX)
    marks_mmio : a page known to be MMIO has an exit reason of its own
    announces_reads : an MMIO read is traced as unsatisfied first also where a device in the kernel answers it
    resets_anywhere : a vCPU that the VMM resets begins wherever it is told; else at a fixed RIP
    perf_guest_key : `perf kvm stat` measures the time in guest mode and keeps it under this number of the exit reason
        that ends it; None: it measures from exit to entry, under the exit reason
    is_vector : RIPs (columns) -> whether the guest may be there because an exception was delivered; None: not told
    rule_sources : rule -> KVM's functions that it is about on this ISA, where the rule names others
    interrupts_without_exit : the processor may deliver and end interrupts itself, without an event of KVM
    """

    name: str
    number: int
    title: str
    module: str
    rows: tuple[ExitRow, ...]
    other_names: Mapping[int, str] = field(default_factory=dict)
    aliases: Mapping[str, int] = field(default_factory=dict)
    prefix: str = ""
    prefixed_words: Mapping[str, str] = field(default_factory=dict)
    code_mask: int = 0xFFFFFFFF
    flag_names: Mapping[int, str] = field(default_factory=dict)
    failed_entry_bit: int = 0
    failed_entry_code: int | None = None
    bus_lock_bit: int = 0
    hexadecimal: bool = False

    signature: frozenset[str] = frozenset()
    derived: Mapping[tuple[str, str], tuple[Part, ...]] = field(default_factory=dict)
    exit_intr_info: bool = False
    vectoring_field: str = ""
    vectoring_refused: bool = False
    fault_address_field: str = ""
    next_rip_field: str = ""
    event_types: Mapping[int, str] = field(default_factory=dict)

    decode_io: Callable[[Any, Any], IoAccess] | None = None
    decode_cr: Callable[[Any, Any], CrAccess] | None = None
    decode_dr: Callable[[Any, Any], DrAccess] | None = None
    decode_msr_write: Callable[[Any, Any], Any] | None = None
    encode_io: Callable[[IoAccess], tuple[int, int]] | None = None
    encode_msr: Callable[[bool], int] | None = None
    encode_fault: Callable[[str], tuple[int, int]] | None = None
    describe_fault: Callable[[int], str] | None = None
    classify_fault: Callable[[int], str] | None = None
    never_told: Callable[[Any], Any] | None = None
    syndrome_code: Callable[[Any], Any] | None = None
    decode_abort: Callable[[Any], AbortAccess] | None = None
    decode_trap: Callable[[Any], RegisterAccess] | None = None
    describe_syndrome: Callable[[int], str] | None = None
    describe_register: Callable[[int], str] | None = None

    run_function: str = ""
    run_flags: str = ""
    run_source: str = ""
    late_exit: str = ""
    control_structure: str = ""
    vcpu_object: str = ""
    follow_ups: tuple[str, ...] = ()
    bystanders: tuple[str, ...] = ()
    untraced: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()
    any_exit_causes: Mapping[int, str] = field(default_factory=dict)
    bus_lock_userspace: frozenset[int] = frozenset()
    world_switch: tuple[SwitchStep, ...] = ()
    brackets: tuple[tuple[str, str, str], ...] = ()
    unseen: tuple[str, ...] = ()

    nesting: Nesting | None = None

    early_exit_field: str = ""
    decodes_to_skip: bool = False
    soft_events_move_rip: bool = False
    emulates_real_mode: bool = False
    hypercall: bytes = b""
    resets_fpu: bool = False
    marks_mmio: bool = False
    announces_reads: bool = False
    resets_anywhere: bool = False
    perf_guest_key: Callable[[int], int] | None = None
    is_vector: Callable[[Any], Any] | None = None
    rule_sources: Mapping[str, str] = field(default_factory=dict)
    interrupts_without_exit: bool = False

    @cached_property
    def exits(self) -> Mapping[int, ExitRow]:
        """The rows by code, ascending."""
        return MappingProxyType({row.code: row for row in sorted(self.rows, key=lambda row: row.code)})

    @cached_property
    def names(self) -> Mapping[int, str]:
        """What the kernel prints for each code that it has a name for, ascending."""
        named = {row.code: row.name for row in self.rows if row.name} | dict(self.other_names)
        return MappingProxyType(dict(sorted(named.items())))

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {name: code for code, name in self.names.items()} | dict(self.aliases)

    def codes(self, *kinds: str) -> frozenset[int]:
        """Return the exit codes that belong to one of these EXIT_KINDS."""
        if kinds not in self._codes:
            self._codes[kinds] = frozenset().union(*(self._by_kind.get(kind, frozenset()) for kind in kinds))
        return self._codes[kinds]

    def code_of(self, kind: str) -> int:
        """Return the one exit code of a kind (the lowest, if there are several)."""
        return min(self.codes(kind))

    @cached_property
    def _codes(self) -> dict[tuple[str, ...], frozenset[int]]:
        return {}  # what was asked for

    @cached_property
    def _by_kind(self) -> Mapping[str, frozenset[int]]:
        return {kind: frozenset(row.code for row in self.rows if kind in row.kinds) for kind in EXIT_KINDS}

    def code(self, number: Any) -> Any:
        """Return the key into `exits` of the number that kvm_exit carries (ints or columns)."""
        return number & self.code_mask

    def entry_failed(self, number: Any) -> Any:
        """Say whether the VM-entry itself failed, so that no guest instruction ran (ints or columns)."""
        if self.failed_entry_bit:
            return (number & self.failed_entry_bit) != 0
        return (number & 0xFFFFFFFF) == (-1 if self.failed_entry_code is None else self.failed_entry_code)

    def bus_locked(self, number: Any) -> Any:
        """Say whether the guest took a bus lock on its way out (ints or columns)."""
        return (number & self.bus_lock_bit) != 0

    def tells_host_interrupt(self, number: int, information: int) -> bool:
        """Say whether interruption information beside an exit is that of the host's interrupt which caused it."""
        kind = self.code(number) in self.codes("external_interrupt")
        return kind and bool(information & VALID) and not information & EVENT_TYPE

    def describe(self, number: int) -> str:
        """Name a VM-exit as the kernel prints it, with its flags.

        Parameters
        ----------
        number : int, the raw u32 of kvm_exit (a sign-extended -1 is accepted)

        Returns
        -------
        str, e.g. "CPUID", "INVALID_STATE FAILED_VMENTRY", "hlt"; "UNKNOWN(0x4d)" for a code that has no name
        """
        code = number & self.code_mask
        words = [self.names.get(code, f"UNKNOWN({code:#x})")]
        flags = number & 0xFFFFFFFF & ~self.code_mask
        for bit, name in self.flag_names.items():
            if flags & bit:
                words.append(name)
                flags &= ~bit
        return " ".join([*words, f"{flags:#x}"] if flags else words)

    def number_of(self, text: str) -> int | None:
        """Return the number of an exit reason as printed, flags included; None if it is none of this ISA's."""
        name, flags = text, 0
        head, _, last = text.rpartition(" ")
        if last.startswith("0x") and head and self.code_mask != 0xFFFFFFFF:
            name, flags = head, int(last, 16) & 0xFFFFFFFF & ~self.code_mask
        for bit, word in self.flag_names.items():
            if name.endswith(f" {word}"):
                name, flags = name.removesuffix(f" {word}"), flags | bit
        if self.prefix and name.startswith(self.prefix):
            name = self._prefixed(name.removeprefix(self.prefix))
        code = self._numbers.get(name)
        return None if code is None else code | flags

    def _prefixed(self, short: str) -> str:
        """Return the kernel's name of what trace-cmd's plug-in calls `short` behind its prefix."""
        for word, name in self.prefixed_words.items():
            if word.endswith("_") and short.startswith(word):
                return name.format(short.removeprefix(word))
        return self.prefixed_words.get(short, short.lower())

    def describe_code(self, code: int) -> str:
        """Return a code as the reference manual writes it."""
        return f"{code:#x}" if self.hexadecimal else str(code)
