"""What `kvmtrace top` shows, from looks at the maps to the lines on the screen."""

from __future__ import annotations

import io
from typing import Any

import pytest
from click.testing import CliRunner

from kvmtrace.capture.bpf.rates import rates_between
from kvmtrace.cli import top
from kvmtrace.render.text.report_text import filter_line

PHASES = ("unknown", "guest", "kernel", "userspace", "blocked", "preempted")


def row(
    tid: int,
    pid: int = 50,
    vcpu_id: int | None = 0,
    exits: dict[int, int] | None = None,
    userspace: dict[int, int] | None = None,
    **times: int,
) -> dict[str, Any]:
    return {
        "tid": tid,
        "pid": pid,
        "comm": f"t{tid}",
        "vcpu_id": vcpu_id,
        "isa": "vmx",
        "time_ns": dict.fromkeys(PHASES, 0) | times,
        "exits": [{"exit_reason": reason, "count": count} for reason, count in (exits or {}).items()],
        "userspace_exits": [
            {"reason": reason, "error": None, "count": count} for reason, count in (userspace or {}).items()
        ],
    }


def test_rates_are_differences_per_second_and_shares_of_the_time_between() -> None:
    before = [row(1, exits={48: 100, 10: 7}, guest=1000, kernel=1000)]
    after = [row(1, exits={48: 300, 10: 7}, userspace={2: 50}, guest=4000, kernel=2000)]
    (rates,) = rates_between(before, after, 2.0)
    assert rates.exits == {48: 100.0}
    assert rates.userspace_exits == {2: 25.0}
    assert rates.shares["guest"] == pytest.approx(0.75)
    assert sum(rates.shares.values()) == pytest.approx(1)


def test_a_thread_that_is_new_counts_from_its_start() -> None:
    (rates,) = rates_between([], [row(1, exits={10: 5}, kernel=3)], 1.0)
    assert rates.exit_rate == 5


def test_vms_stay_together_and_the_busiest_is_first() -> None:
    rates = rates_between(
        [], [row(1, 50, 0, {10: 5}), row(2, 60, 0, {10: 1}), row(3, 50, 1, {10: 1}), row(4, 60, 1, {10: 90})], 1.0
    )
    assert [r.tid for r in top.arrange(rates, "exits")] == [4, 2, 1, 3]
    assert [r.tid for r in top.arrange(rates, "vcpu")] == [1, 3, 2, 4]


def test_plain_lines_name_reasons_and_fit_the_columns() -> None:
    screen = top.Screen(rates=rates_between([], [row(1, exits={48: 20, 999: 1}, guest=9, kernel=1)], 1.0))
    lines = top.render_plain(screen).splitlines()
    assert lines[0].startswith("1 VM, 1 vCPU, 21 exits/s")
    assert "EPT_VIOLATION 20" in lines[2]
    assert "90.0" in lines[2]
    assert len(lines) == 3


def test_without_vm_exits_it_says_what_cannot_be_seen() -> None:
    screen = top.Screen(rates=rates_between([], [row(1, vcpu_id=None, userspace={2: 20}, kernel=1)], 1.0))
    text = top.render_plain(screen)
    assert "IO 20" in text
    assert top.NO_EXITS in text
    assert text.splitlines()[2].split()[4:5] == ["20"]


def test_keys() -> None:
    screen = top.Screen()
    assert screen.press("p")
    assert screen.paused
    assert screen.press("p")
    assert not screen.paused
    for key, name in top.SORT_KEYS.items():
        assert screen.press(key)
        assert screen.sort == name
    assert screen.press("x")
    assert not screen.press("q")


def test_the_live_screen_renders_at_any_width() -> None:
    from rich.console import Console

    rates = rates_between([], [row(1, exits={48: 20}, guest=9, kernel=1), row(2, 60, 1, {10: 3})], 1.0)
    for width in (40, 100, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(top.render(top.Screen(rates=rates, paused=True)))
        text = console.export_text()
        assert "PAUSED" in text
        assert max(map(len, text.splitlines())) <= width


def test_no_such_process() -> None:
    result = CliRunner().invoke(top.command, ["-p", "4194304"])
    assert result.exit_code != 0
    assert "there is no process 4194304" in str(result.exception)


def test_the_report_says_what_was_filtered() -> None:
    assert filter_line({"sample": "1 in 10 VM-exits"}).startswith("1 in 10 VM-exits.")
    assert not filter_line({"syscalls:sys_enter_mmap": "fd < 0x7fffffff"})
    assert not filter_line(None)


def test_a_process_of_which_nothing_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "kvm_modules", lambda: ["kvm", "kvm_pvm"])
    text = top.render_plain(top.Screen(pid=7, n_vms=1, n_vcpus=2))
    assert text.startswith("1 VM, 2 vCPUs, 0 exits/s")
    assert "run in the guest without leaving it, which this KVM does not trace" in text
    assert "process 7 has no vCPU" in top.render_plain(top.Screen(pid=7))
    assert "no vCPU has run yet" in top.render_plain(top.Screen())
    text = top.render_plain(top.Screen(n_vms=2, n_vcpus=3))
    assert text.startswith("2 VMs, 3 vCPUs, 0 exits/s")
    assert "nothing was seen of their vCPUs yet" in text
    assert "which this KVM does not trace" in text


def test_a_vm_that_is_there_is_counted_before_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "vcpus_of", {7: 2, 8: 1, 9: None}.get)
    screen = top.Screen()
    top.Sampler._count_open(screen, [7, 8, 9, 7])
    assert (screen.n_vms, screen.n_vcpus) == (2, 3)
    screen = top.Screen(pid=8)
    top.Sampler._count_open(screen, [7])
    assert (screen.n_vms, screen.n_vcpus) == (1, 1)


@pytest.mark.parametrize("interval", ["1e308", "inf", "nan", "0"])
def test_intervals_that_cannot_be(interval: str) -> None:
    done = CliRunner().invoke(top.command, ["-i", interval, "-p", "4194305"])
    assert done.exit_code == 2
