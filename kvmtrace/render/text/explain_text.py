"""The story of one VM-exit as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.terminal import Style, duration, escape
from kvmtrace.render.text.event_fields import describe_fields
from kvmtrace.render.text.story_sentence import describe_story

if TYPE_CHECKING:
    from kvmtrace.check.explain import Story, StoryEvent, StoryStep


MOST_RAN = 6


def _event_lines(event: StoryEvent, start_ns: int, style: Style, *, marked: bool) -> list[str]:
    fields = ", ".join(describe_fields(event.event, event.fields))
    head = f"{'>' if marked else ' '} {(event.ts_ns - start_ns) / 1000:+12.3f} us  cpu {event.cpu:<2} {event.event}  "
    return style.wrapped(head + fields, "", " " * 26) or [head]


def _step_lines(placed: StoryStep, story: Story, style: Style) -> list[str]:
    step = placed.step
    if placed.after is None or placed.before is None:
        evidence = "no recorded probe brackets this step"
    else:
        first, last = story.events[placed.after], story.events[placed.before]
        evidence = f"between {first.event} and {last.event}, {(placed.dur_ns or 0) / 1000:,.3f} us in all"
    lines = style.wrapped(f"{step.phase}: {step.title}  ({evidence})", "      | ", "      |   ")
    for who, text in (
        ("KVM", step.kvm),
        ("CPU", step.hardware),
        ("in", f"{step.function}"),
        ("state", ", ".join(step.fields)),
    ):
        if text:
            lines += style.wrapped(f"{who}: {text}", "      |    ", "      |      ")
    return lines


def render_story(story: Story, style: Style | None = None) -> str:
    """Render a story: a plain sentence, then the events, the model's steps indented behind the event they follow."""
    style = style or Style()
    vcpu = "a vCPU" if story.vcpu_id is None else f"vCPU {story.vcpu_id}"
    vcpu += f" of {escape(story.vm)}" if story.vm else ""
    start = story.events[0].ts_ns
    span_us = (story.events[-1].ts_ns - start) / 1000
    lines = [
        *map(style.title, style.wrapped(describe_story(story))),
        "",
        *style.wrapped(
            f"VM-exit {story.number} of {story.n_exits} of {vcpu} (thread {story.tid}, {story.isa}): {story.reason}"
        ),
        *style.wrapped(
            f"{len(story.events)} events in {span_us:,.3f} us; '>' marks the VM-exit; indented: the model's steps"
        ),
        "",
    ]
    placed = {i: [step for step in story.steps if step.after == i] for i in range(len(story.events))}
    for i, event in enumerate(story.events):
        lines += _event_lines(event, start, style, marked=i == story.exit_at)
        for step in placed[i]:
            lines += _step_lines(step, story, style)
    homeless = [step for step in story.steps if step.after is None]
    if homeless:
        lines += ["", "Steps that no recorded event brackets here:"]
        for step in homeless:
            lines += style.wrapped(f"{step.step.phase}: {step.step.title} ({step.step.function})", "  ", "    ")
    if story.ran:
        ran = ", ".join(f"{escape(who)} {duration(ns)}" for who, ns in story.ran[:MOST_RAN])
        lines += ["", *style.wrapped(f"While the vCPU waited for a CPU, there ran: {ran}.")]
    if story.left_out:
        lines += ["", f"{story.left_out} further events of this lifecycle are left out."]
    lines += ["", "No trace can show:"]
    for text in story.unseen:
        lines += style.wrapped(text, "  - ", "    ")
    return "\n".join(lines) + "\n"
