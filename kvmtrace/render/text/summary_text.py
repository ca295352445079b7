"""A summary (`kvmtrace record --summary`) as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.isa.registry import BY_NAME
from kvmtrace.kvm.userspace_exits import describe_userspace_exit_reason
from kvmtrace.render.terminal import count, duration, escape, percent, plural

if TYPE_CHECKING:
    from kvmtrace.formats.summary.summary_file import Cell, Summary, VcpuSummary

BARS = " ▁▂▃▄▅▆▇█"
SHOWN_PHASES = ("guest", "kernel", "userspace", "blocked", "preempted")
ERRORS = {"EINTR": "interrupted (-EINTR)", "other": "failed (other errno)"}
FIRST_BUCKET, LAST_BUCKET = 6, 26  # 64 ns to 67 ms are drawn; what lies outside is drawn at the ends


def name_exit(isa: str | None, reason: int) -> str:
    """Return an exit reason's name."""
    known = BY_NAME.get(isa or "")
    return f"{reason:#x}" if known is None else known.describe(reason)


def name_userspace_exit(key: int | str) -> str:
    """Return a userspace exit's name."""
    return describe_userspace_exit_reason(key) if isinstance(key, int) else ERRORS.get(key, escape(key))


def draw_histogram(cell: Cell) -> str:
    """Return a log2 histogram as a row of bars, 64 ns at the left, 64 ms at the right."""
    low, high = FIRST_BUCKET, LAST_BUCKET
    shown = [sum(cell.buckets[: low + 1]), *cell.buckets[low + 1 : high], sum(cell.buckets[high:])]
    top = max(shown)
    return "".join(BARS[-(-8 * n // top)] if top else " " for n in shown)


def render_summary(summary: Summary) -> str:
    """Return the summary as text, at most 100 columns wide."""
    meta = summary.meta
    seconds = (meta.get("duration_ns") or 0) / 1e9
    where = f"{escape(str(meta.get('host')))}, kernel {escape(str(meta.get('kernel')))}"
    lines = [
        f"{plural(len(summary.vcpus), 'vCPU thread')}, {seconds:.2f} s, {where}",
        "counted in the kernel: no events, so no comparison with the model",
        "",
    ]
    names = {vm["pid"]: vm["name"] for vm in meta.get("vms") or [] if vm["name"]}
    for vcpu in sorted(summary.vcpus, key=lambda vcpu: (names.get(vcpu.pid, ""), vcpu.pid)):
        lines += _vcpu_lines(vcpu, names.get(vcpu.pid))
    lines += [f"note: {escape(str(note))}" for note in meta.get("notes") or []]
    return "\n".join(lines) + "\n"


def _vcpu_lines(vcpu: VcpuSummary, vm: str | None) -> list[str]:
    who = f"vCPU {vcpu.vcpu_id}" if vcpu.vcpu_id is not None else "vCPU"
    who += f" of {escape(vm)}" if vm else ""
    words = {"kernel": "kernel" if vcpu.exits else "KVM_RUN", "userspace": "VMM"}
    shares = [
        f"{words.get(phase, phase)} {percent(vcpu.time_ns[phase], vcpu.wall_ns)}"
        for phase in SHOWN_PHASES
        if phase != "guest" or vcpu.exits
    ]
    lines = [
        f"{who}, thread {vcpu.tid} ({escape(vcpu.comm)}) of process {vcpu.pid}: {duration(vcpu.wall_ns)}",
        "  " + ", ".join(shares),
    ]
    exits = {name_exit(vcpu.isa, reason): cell for reason, cell in vcpu.exits.items()}
    lines += _table("VM-exit to VM-entry", exits)
    lines += _table("userspace exit to KVM_RUN", {name_userspace_exit(k): c for k, c in vcpu.userspace_exits.items()})
    return [*lines, ""]


def _table(title: str, cells: dict[str, Cell]) -> list[str]:
    if not cells:
        return []
    total = sum(cell.total_ns for cell in cells.values())
    lines = [f"  {title:<26}{'count':>11}{'time':>8}{'mean':>9}{'p50 <':>9}{'p99 <':>9}  64ns             64ms"]
    for name, cell in sorted(cells.items(), key=lambda item: (-item[1].total_ns, -item[1].count, item[0])):
        lines.append(
            f"  {name:<26.26}{count(cell.count):>11}{percent(cell.total_ns, total):>8}"
            f"{duration(cell.mean_ns):>9}{duration(cell.quantile_ns(0.5)):>9}"
            f"{duration(cell.quantile_ns(0.99)):>9}  {draw_histogram(cell)}".rstrip()
        )
    return lines
