"""A VM-exit's story in one plain sentence: what the guest did, who served it, how long it took."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.isa.registry import BY_NAME, describe_register
from kvmtrace.isa.words import decode_intr_info, describe_intr_info
from kvmtrace.kvm.hypercalls import describe_hypercall
from kvmtrace.kvm.msrs import describe_msr
from kvmtrace.kvm.ports import describe_port
from kvmtrace.kvm.userspace_exits import describe_userspace_exit
from kvmtrace.model.thresholds import threshold
from kvmtrace.render.accesses import describe_access, named
from kvmtrace.render.terminal import duration, escape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kvmtrace.check.explain import Story, StoryEvent
    from kvmtrace.isa.base import Isa

    Fields = Mapping[str, int | str]

LEAVES = ("sys_exit_ioctl", "kvm_vcpu_ioctl_return", "kvm_userspace_exit")  # the last of them that is there
RETURNS = ("sys_enter_ioctl", "kvm_vcpu_ioctl", "kvm_fpu", "kvm_entry")  # the first
MMIO_WRITE = 2  # KVM_TRACE_MMIO_WRITE, include/trace/events/kvm.h
# kind of VM-exit (isa/base.py) -> what happened, where no event of its own tells more
KINDS = {
    "external_interrupt": "An interrupt of the host stopped the guest",
    "interrupt_window": "The guest became ready to take an interrupt",
    "halt": "The guest halted: it had nothing to do until an interrupt",
    "triple_fault": "The guest shut down after a fault that it could not handle",
    "task_switch": "The guest switched tasks in hardware",
    "nested_entry": "The guest is a hypervisor and entered its own guest",
    "exception": "The guest raised an exception that KVM watches for",
    "known_mmio": "The guest accessed the registers of a device in memory",
    "cpuid": "The guest asked what its processor can do (CPUID)",
}


def _number(fields: Fields, name: str) -> int:
    value = fields.get(name, 0)
    return value if isinstance(value, int) else 0


def _pio(fields: Fields) -> str:
    port = _number(fields, "port")
    name = describe_port(port)
    where = f"{escape(name)} (port {port:#x})" if name else f"port {port:#x}"
    if not _number(fields, "rw"):
        return f"The guest read {where}"
    value = f"{_number(fields, 'val'):#x}" if "val" in fields else "a value"
    return f"The guest wrote {value} to {where}"


def _mmio(fields: Fields) -> str:
    gpa = f"the device at guest-physical address {_number(fields, 'gpa'):#x}"
    if _number(fields, "type") == MMIO_WRITE:
        return f"The guest wrote {_number(fields, 'val'):#x} to {gpa}"
    return f"The guest read {gpa}"


def _msr(fields: Fields) -> str:
    msr = _number(fields, "ecx")
    name = named(msr, describe_msr(msr))
    if not _number(fields, "write"):
        did = f"The guest read MSR {name}"
    else:
        did = f"The guest wrote {_number(fields, 'data'):#x} to MSR {name}"
    return did + (", which KVM refused with #GP" if _number(fields, "exception") else "")


def _register(fields: Fields) -> str:
    register = describe_register(_number(fields, "register"))
    return f"The guest {'read' if _number(fields, 'is_read') else 'wrote'} {register}"


def _cr(fields: Fields) -> str:
    if not _number(fields, "rw"):
        return f"The guest read cr{_number(fields, 'cr')}"
    return f"The guest wrote {_number(fields, 'val'):#x} to cr{_number(fields, 'cr')}"


# event -> what the guest did, the most telling event first
DEEDS: dict[str, Callable[[Fields], str]] = {
    "kvm_mmio": _mmio,
    "kvm_pio": _pio,
    "kvm_msr": _msr,
    "kvm_cr": _cr,
    "kvm_cpuid": lambda fields: f"The guest asked for CPUID leaf {_number(fields, 'function'):#x}",
    "kvm_hypercall": lambda fields: (
        f"The guest called KVM: {describe_hypercall(_number(fields, 'nr')) or _number(fields, 'nr')}"
    ),
    "kvm_handle_sys_reg": _register,
    "kvm_hvc_arm64": lambda fields: f"The guest called {describe_access('smccc', _number(fields, 'r0'), None)} (HVC)",
}
FAULTS = ("kvm_page_fault", "kvm_guest_fault")
# Isa.classify_fault -> what of the place
PLACES = {
    "unmapped": "which was not mapped for it",
    "refused": "which is mapped, but not for that access",
    "device": "which KVM knows to be no memory but a device's",
    "": "where it may not go on by itself",
}


def describe_story(story: Story) -> str:
    """Return the sentence."""
    after = story.events[story.exit_at :]
    own = _own(after)
    if "kvm_nested_vmexit" not in own:
        deed = _deed(story, after) + _interrupted(story)
        place, alike = story.alike
        if alike >= threshold("no_progress"):
            served = _no_progress(story, after[: len(own)])
            return f"{deed}; {served} It is number {place:,} of {alike:,} in a row that are alike: no progress."
        return f"{deed}; {_service(after)}"
    deed = _deed(story, after[: len(own)]).replace("The guest", "The guest's guest (L2)", 1)
    passed_on = "kvm_nested_vmexit_inject" in own
    return f"{deed}; {_passed_on(story, after) if passed_on else _service(after)}"


def _own(after: Sequence[StoryEvent]) -> list[str]:
    """Return the names of the events from the VM-exit up to the next VM-entry."""
    names = [event.event for event in after]
    return names[: names.index("kvm_entry")] if "kvm_entry" in names else names


def _passed_on(story: Story, after: Sequence[StoryEvent]) -> str:
    """Say what the hypervisor in the guest (L1) did about an exit of its guest."""
    isa = BY_NAME[story.isa]
    counts: dict[str, int] = {}
    for event in after[1:]:
        if event.event == "kvm_exit":
            name = escape(isa.describe(_number(event.fields, "exit_reason")))
            counts[name] = counts.get(name, 0) + 1
    own = ", ".join(
        f"{name} {n} times" if n > 1 else name for name, n in sorted(counts.items(), key=lambda one: -one[1])
    )
    total = sum(counts.values())
    took = (
        f"took {total} VM-exit{'s' if total > 1 else ''} of its own ({own})" if total else "took no VM-exit of its own"
    )
    again = story.events[-1].event == "kvm_entry" and any(
        event.event in ("kvm_nested_vmenter", "kvm_nested_vmrun") for event in after
    )
    end = (
        f"entered L2 again after {duration(after[-1].ts_ns - after[0].ts_ns)}"
        if again
        else "did not enter L2 again here"
    )
    return f"KVM passed it on to the hypervisor in the guest (L1), which {took} and {end}."


def _deed(story: Story, after: Sequence[StoryEvent]) -> str:
    for event, deed in DEEDS.items():
        found = next((one for one in after if one.event == event), None)
        if found is not None:
            return deed(found.fields)
    isa, fields = BY_NAME[story.isa], story.events[story.exit_at].fields
    fault = next((one for one in after if one.event in FAULTS), None)
    if fault is not None:
        return _fault(isa, fields, fault.fields)
    row = isa.exits.get(isa.code(_number(fields, "exit_reason")))
    for kind in row.kinds if row else ():
        if kind == "second_level_fault":
            return _fault(isa, fields, {})
        if kind in KINDS:
            return KINDS[kind]
    return f"The guest left with {escape(story.reason)}"


def _fault(isa: Isa, fields: Fields, fault: Fields) -> str:
    """Say where the guest faulted, and why as far as the exit's own information tells."""
    told = next((_number(of, name) for of, name in ((fields, "info1"), (fault, "hsr")) if name in of), None)
    kind = isa.classify_fault(told) if isa.classify_fault is not None and told is not None else ""
    names = ((fault, "fault_address"), (fault, "address"), (fields, isa.fault_address_field))
    address = next((_number(of, name) for of, name in names if name in of), None)
    return f"The guest touched {'a page' if address is None else f'{address:#x}'}, {PLACES[kind]}"


def _interrupted(story: Story) -> str:
    """Say whose delivery the VM-exit interrupted; "" if none."""
    isa, fields = BY_NAME[story.isa], story.events[story.exit_at].fields
    info = _number(fields, isa.vectoring_field) & 0xFFFFFFFF
    if not decode_intr_info(info).valid:
        return ""
    return f", while the processor was delivering an event to it ({describe_intr_info(isa.event_types, info)})"


def _no_progress(story: Story, own: Sequence[StoryEvent]) -> str:
    """Say what KVM did about a VM-exit that comes again and again."""
    emulated = next((event for event in own if event.event == "kvm_emulate_insn"), None)
    did = [] if emulated is None else [f"emulated the instruction at {_number(emulated.fields, 'rip'):#x}"]
    again = any(event.fields.get("reinjected") for event in own)
    did += ["set the delivery up again"] if again else []
    took = duration(story.events[-1].ts_ns - own[0].ts_ns)
    entered = story.events[-1].event == "kvm_entry"
    end = f"after {took} the guest was back at the same instruction" if entered else "there the recording ends"
    return f"KVM {' and '.join(did) or 'handled it'}, and {end}."


def _service(after: Sequence[StoryEvent]) -> str:
    """Say who served the VM-exit, and how long it took until the guest ran again."""
    entered = after[-1].event == "kvm_entry"
    took = duration(after[-1].ts_ns - after[0].ts_ns)
    again = f"the guest ran again after {took}" if entered else "the recording ends before the guest runs again"
    left = [i for i, event in enumerate(after) if event.event == "kvm_userspace_exit"]
    if not left:
        waited = _waited(after)
        return f"KVM served it in the kernel{waited}, and {again}."
    first = after[left[0]]
    errno = _number(first.fields, "errno")
    reason = describe_userspace_exit(_number(first.fields, "reason"), errno)
    in_vmm = sum(_in_vmm(after[at:]) for at in left)
    which = f", which took {duration(in_vmm)}" if in_vmm else ""
    times = f", {len(left)} times" if len(left) > 1 else ""
    if errno < 0:
        return f"then KVM_RUN returned {reason}{times}; {again}."
    return f"KVM could not serve it and asked the VMM ({reason}{times}){which}; {again}."


def _in_vmm(after: Sequence[StoryEvent]) -> int:
    """Return the time from one return of KVM_RUN to the next call, as closely as the events tell, ns."""
    back = _first(after, RETURNS)
    if back is None:
        return 0
    out = max((i for i, event in enumerate(after[:back]) if event.event in LEAVES), default=0)
    return after[back].ts_ns - after[out].ts_ns


def _first(after: Iterable[StoryEvent], names: Sequence[str]) -> int | None:
    return next(
        (
            i
            for i, event in enumerate(after)
            if event.event in names and (event.event != "kvm_fpu" or event.fields.get("load"))
        ),
        None,
    )


def _waited(after: Sequence[StoryEvent]) -> str:
    """Say how long the vCPU slept or waited for a CPU, if the events tell."""
    wakeup = next((event for event in after if event.event == "kvm_vcpu_wakeup"), None)
    if wakeup is not None:
        how = "slept" if wakeup.fields.get("waited") else "polled"
        return f", where the vCPU {how} for {duration(_number(wakeup.fields, 'ns'))}"
    return ", where the thread was switched out" if any(event.event == "sched_switch" for event in after) else ""
