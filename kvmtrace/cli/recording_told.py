"""What `kvmtrace record` says of a recording that has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmtrace.capture.settings import RecordResult


def describe(result: RecordResult) -> list[str]:
    """Say what was recorded, what was lost and what it cost."""
    meta = result.meta
    seconds = (meta.get("duration_ns") or 0) / 1e9
    count = "events" if result.n_events is None else f"{result.n_events:,} events"
    rate = f" ({result.n_events / seconds:,.0f}/s)" if result.n_events and seconds else ""
    did = "monitored" if "n_forbidden" in meta else f"recorded {count}{rate}"
    what = f"{did} in {seconds:.2f} s with {meta['backend']}"
    lines = [f"{what}: {result.path} ({human_bytes(result.file_bytes)})"]
    if result.by_kind:
        top = sorted(result.by_kind.items(), key=lambda item: -item[1])
        lines.append(
            "  " + ", ".join(f"{name} {count:,}" for name, count in top[:6]) + (", ..." if len(top) > 6 else "")
        )
    each = f", {result.recorder_cpu_s / result.n_events * 1e9:,.0f} ns per event" if result.n_events else ""
    cost = f"the recorder took {result.recorder_cpu_s:.2f} s of CPU time{each}"
    if meta.get("cost_ns_per_event"):
        cost += f", the traced threads {meta['cost_ns_per_event']:.0f} ns per event"
    if meta.get("buffer_bytes"):
        cost += f"; buffer {human_bytes(meta['buffer_bytes'])} per CPU"
    if "n_forbidden" in meta:
        forbidden = meta["n_forbidden"]
        lines.append(f"{forbidden:,} steps that the model forbids" if forbidden else "no step that the model forbids")
    lines.append(f"lost {describe_loss(result)}; {cost}")
    discarded = meta.get("discarded")
    if discarded:
        lines.append(f"older events deleted to keep the size: {discarded['events']:,}")
    lines += [f"note: {note}" for note in meta.get("notes", [])]
    if result.ended_by not in ("target", "time", "interrupt"):
        lines.append(f"the recording ended early: {result.ended_by}")
    if result.target_status:
        lines.append(f"the target {describe_status(result.target_status)}")
    return lines


def describe_loss(result: RecordResult) -> str:
    """Say how many events were lost, and where."""
    if result.lost is None:
        return "an unknown number of events"
    if not result.lost:
        return "0 events"
    loss = result.meta["loss"]
    where = [f"CPU {cpu}: {count:,}" for cpu, count in loss["by_cpu"].items()]
    # in an interrupt while a BPF program ran there: whether it was an event of the target nobody looked
    where += [f"{name}: up to {n:,} in interrupts" for name, n in loss.get("missed_in_interrupts", {}).items()]
    return f"{result.lost:,} events ({', '.join(where)})"


def describe_status(status: int) -> str:
    """Put an exit status in words."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"


def human_bytes(size: float) -> str:
    """Return a size for people: 3.2 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
