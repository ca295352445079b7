"""The story of one VM-exit as text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from kvmtrace.isa.registry import describe_exit_reason
from kvmtrace.kvm.ioctls import describe_ioctl
from kvmtrace.kvm.userspace_exits import describe_userspace_exit

if TYPE_CHECKING:
    from kvmtrace.check.explain import Story, StoryEvent, StoryStep

WIDTH = 100
# fields that say nothing to a reader
NOISE = {"__syscall_nr", "__probe_ip", "__probe_func", "__probe_ret_ip"}
DECIMAL = {
    "vcpu_id",
    "tid",
    "fd",
    "len",
    "size",
    "count",
    "errno",
    "prev_pid",
    "next_pid",
    "prev_prio",
    "next_prio",
    "load",
    "ret",
    "ns",
    "prev_state",
    "waited",
    "vcpu",
    "apicid",
    "rw",
    "write",
    "coalesced",
    "hard",
    "soft",
}


def _clean(text: str) -> str:
    """Make text of a trace safe for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _field(event: StoryEvent, name: str, value: int | str) -> str:
    if event.event == "kvm_exit" and name == "exit_reason":
        return f"{name} {describe_exit_reason(int(event.fields.get('isa', 1)), int(value))}"
    if event.event in {"sys_enter_ioctl", "kvm_vcpu_ioctl"} and name == "cmd":
        return f"{name} {describe_ioctl(int(value))}"
    if event.event == "kvm_userspace_exit" and name == "reason":
        return f"{name} {describe_userspace_exit(int(value), int(event.fields.get('errno', 0)))}"
    if isinstance(value, str):
        return f"{name} {_clean(value)}"
    decimal = abs(value) < (1 << 31 if name in DECIMAL else 10)
    return f"{name} {value}" if decimal else f"{name} {value & (1 << 64) - 1:#x}"


def _event_lines(event: StoryEvent, start_ns: int, *, marked: bool) -> list[str]:
    fields = ", ".join(_field(event, name, value) for name, value in event.fields.items() if name not in NOISE)
    head = f"{'>' if marked else ' '} {(event.ts_ns - start_ns) / 1000:+12.3f} us  cpu {event.cpu:<2} {event.event}  "
    return textwrap.wrap(head + fields, WIDTH, subsequent_indent=" " * 26) or [head]


def _step_lines(placed: StoryStep, story: Story) -> list[str]:
    step = placed.step
    if placed.after is None or placed.before is None:
        evidence = "no recorded probe brackets this step"
    else:
        first, last = story.events[placed.after], story.events[placed.before]
        evidence = f"between {first.event} and {last.event}, {(placed.dur_ns or 0) / 1000:,.3f} us in all"
    lines = textwrap.wrap(
        f"{step.phase}: {step.title}  ({evidence})", WIDTH, initial_indent="      | ", subsequent_indent="      |   "
    )
    for who, text in (
        ("KVM", step.kvm),
        ("CPU", step.hardware),
        ("in", f"{step.function}"),
        ("state", ", ".join(step.fields)),
    ):
        if text:
            lines += textwrap.wrap(
                f"{who}: {text}", WIDTH, initial_indent="      |    ", subsequent_indent="      |      "
            )
    return lines


def render_story(story: Story) -> str:
    """Render a story: events at the left margin, the model's steps indented behind the event they follow."""
    vcpu = "a vCPU" if story.vcpu_id is None else f"vCPU {story.vcpu_id}"
    start = story.events[0].ts_ns
    span_us = (story.events[-1].ts_ns - start) / 1000
    lines = [
        f"VM-exit {story.number} of {story.n_exits} of {vcpu} (thread {story.tid}, {story.isa}): {story.reason}",
        f"{len(story.events)} events in {span_us:,.3f} us; '>' marks the VM-exit; indented: the model's steps",
        "",
    ]
    placed = {i: [step for step in story.steps if step.after == i] for i in range(len(story.events))}
    for i, event in enumerate(story.events):
        lines += _event_lines(event, start, marked=i == story.exit_at)
        for step in placed[i]:
            lines += _step_lines(step, story)
    homeless = [step for step in story.steps if step.after is None]
    if homeless:
        lines += ["", "Steps that no recorded event brackets here:"]
        lines += [f"  {step.step.phase}: {step.step.title} ({step.step.function})" for step in homeless]
    if story.left_out:
        lines += ["", f"{story.left_out} further events of this lifecycle are left out."]
    lines += ["", "No trace can show:"] + [f"  - {text}" for text in story.unseen]
    return "\n".join(lines) + "\n"
