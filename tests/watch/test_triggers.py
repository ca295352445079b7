"""Triggers: how they are written, what of the maps makes them fire, and how often anything is saved."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvmtrace.capture.bpf.summary_maps import ALARM_EXIT, ALARM_RUN_DELAY, ALARM_USERSPACE, Alarm, AlarmLimits
from kvmtrace.capture.ftrace.overwritten import without_overruns
from kvmtrace.cli.main import cli
from kvmtrace.errors import UsageError
from kvmtrace.formats import open_recording
from kvmtrace.formats.common.metadata import clean_meta
from kvmtrace.render.saved_because import saved_because
from kvmtrace.report.anonymize import anonymized
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.watch.commands import Commands
from kvmtrace.watch.detectors import Detectors, fired_by, limits_of, quantile_ns
from kvmtrace.watch.saved_files import RateLimit, keep_quota, name_of, parse_at_most
from kvmtrace.watch.triggers import Fired, Trigger, parse_trigger
from kvmtrace.watch.vm_counters import CountedVm, Counts, Totals
from tests.watch.fake_maps import HLT, cell
from tests.writers.capture_meta import read_meta, two_vms, write_with_meta

MS, S = 10**6, 10**9
SMP = Path(__file__).parents[2] / "fixtures" / "svm-6.12-smp.dat"
SVM = 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slower-than 10ms", Trigger("slower-than", "slower-than 10ms", None, 10 * MS)),
        ("slower-than  1.5 s:hlt", Trigger("slower-than", "slower-than 1.5 s:hlt", "HLT", 1500 * MS)),
        ("slower-than 1us: IO", Trigger("slower-than", "slower-than 1us: IO", "IO", 1000)),
        ("slower-than 1us:mmio", Trigger("slower-than", "slower-than 1us:mmio", "KVM_EXIT_MMIO", 1000)),
        ("rate EPT_VIOLATION>20k/s", Trigger("rate", "rate EPT_VIOLATION>20k/s", "EPT_VIOLATION", per_second=2e4)),
        ("rate * > 5/s", Trigger("rate", "rate * > 5/s", None, per_second=5.0)),
        ("run-delay 5ms", Trigger("run-delay", "run-delay 5ms", None, 5 * MS)),
        ("SLO p99 npf > 1ms over 10s", Trigger("slo", "SLO p99 npf > 1ms over 10s", "NPF", MS, quantile=0.99,
                                                 window_ns=10 * S)),
        ("signal USR1", Trigger("signal", "signal USR1")),
        ("command ./x 'a b'", Trigger("command", "command ./x 'a b'", command=("./x", "a b"))),
        ("model", Trigger("model", "model")),
        ("monitor", Trigger("monitor", "monitor")),
    ],
)  # fmt: skip
def test_how_triggers_are_written(text: str, expected: Trigger) -> None:
    found = parse_trigger(text)
    assert found == expected


@pytest.mark.parametrize(
    "text", ["", "slower-than", "slower-than 0ms", "slower-than 5", "slower-than 1ms:NOTHING", "rate HLT",
             "rate HLT>x/s", "signal KILL", "slo p99 HLT > 1ms over 10ms", "command 'x", "command", "models",
             "slower-than 99999999999999s"],
)  # fmt: skip
def test_what_is_no_trigger(text: str) -> None:
    with pytest.raises(UsageError):
        parse_trigger(text)


def test_the_kernel_is_told_the_lowest_limits() -> None:
    texts = ("slower-than 5ms", "slower-than 2ms:HLT", "run-delay 9ms", "rate HLT>5/s")
    assert limits_of([parse_trigger(text) for text in texts]) == AlarmLimits(2 * MS, 9 * MS)
    assert limits_of([]) == AlarmLimits()


def alarm(kind: int, ns: int, code: int = 0, isa: int = SVM) -> Alarm:
    return Alarm(100 * S, ns, 7, 11, 10, 1, kind, code, isa)


def test_alarms_fire_what_they_mean() -> None:
    triggers = [parse_trigger(text) for text in ("slower-than 5ms", "slower-than 1ms:hlt", "run-delay 3ms")]
    (fired,) = fired_by([alarm(ALARM_EXIT, 2 * MS, HLT)], triggers)
    assert (fired.trigger, fired.reason, fired.tid, fired.vcpu_id) == (triggers[1], "hlt", 11, 1)
    assert (fired.began_ns, fired.dur_ns) == (100 * S - 2 * MS - 7, 2 * MS)
    assert len(fired_by([alarm(ALARM_EXIT, 6 * MS, HLT)], triggers)) == 2
    (late,) = fired_by([alarm(ALARM_RUN_DELAY, 4 * MS)], triggers)
    assert late.reason is None
    assert not fired_by([alarm(ALARM_EXIT, 1 * MS - 1, HLT), alarm(ALARM_RUN_DELAY, 1)], triggers)


def test_userspace_exits_lie_within_vm_exits() -> None:
    """Of a KVM that has VM-exits they count where they are named, of one that has none in any case."""
    any_exit, named = parse_trigger("slower-than 1ms"), parse_trigger("slower-than 1ms:KVM_EXIT_IO")
    io = alarm(ALARM_USERSPACE, 2 * MS, 2)
    assert [fired.trigger for fired in fired_by([io], [any_exit, named])] == [named]
    io = alarm(ALARM_USERSPACE, 2 * MS, 2, isa=0)
    assert [fired.trigger for fired in fired_by([io], [any_exit, named])] == [any_exit, named]


def vm(**exits: Counts) -> CountedVm:
    totals = Totals(exits={("svm", name.upper()): counts for name, counts in exits.items()})
    return CountedVm(7, 1, "qemu", live={7: (0, totals)})


def counts(n: int, ns: int) -> Counts:
    return Counts(n, n * ns, cell(n, ns)["buckets"])


def test_a_rate_fires_once_until_it_was_kept() -> None:
    detectors = Detectors([parse_trigger("rate HLT>1000/s")])
    fired = []
    for second, total in enumerate([0, 500, 2500, 4500, 4600, 4700, 9000]):
        fired.append([one.value for one in detectors.look([vm(hlt=counts(total, 10))], (second + 1) * S)])
    assert fired == [[], [], [2000.0], [], [], [], [4300.0]]


def test_a_quantile_over_a_while() -> None:
    detectors = Detectors([parse_trigger("slo p99 HLT > 1ms over 4s")])
    many = counts(1000, 1000)
    assert not detectors.look([vm(hlt=many)], S)
    many.add(counts(1000, 1000))
    assert not detectors.look([vm(hlt=many)], 4 * S)
    many.add(counts(50, 8 * MS))
    (fired,) = detectors.look([vm(hlt=many)], 5 * S)
    assert 4 * MS < (fired.value or 0) < 17 * MS
    assert fired.reason == "HLT"


@pytest.mark.parametrize(("n", "quantile", "ns"), [(100, 0.5, 3000), (100, 0.99, 3000), (10, 0.5, None)])
def test_quantiles_are_within_their_bucket(n: int, quantile: float, ns: int | None) -> None:
    found = quantile_ns(counts(n, 3000).buckets, quantile)
    assert found is None if ns is None else ns / 2 <= (found or 0) <= 2 * ns


def test_vms_that_are_gone_are_forgotten() -> None:
    detectors = Detectors([parse_trigger("rate HLT>1/s")])
    for second in range(5):
        detectors.look([vm(hlt=counts(second, 1))] if second < 3 else [], (second + 1) * S)
    assert not detectors._past


@pytest.mark.parametrize(("text", "expected"), [("5/h", (5, 3600.0)), ("1/10m", (1, 600.0)), ("2/d", (2, 86400.0))])
def test_at_most(text: str, expected: tuple[int, float]) -> None:
    assert parse_at_most(text) == expected


@pytest.mark.parametrize("text", ["", "0/h", "5", "5/0s", "x/h", "5/w"])
def test_no_at_most(text: str) -> None:
    with pytest.raises(UsageError):
        parse_at_most(text)


def test_no_more_than_so_many_in_a_while() -> None:
    limit = RateLimit(2, 10.0)
    taken = []
    for now in (0.0, 1.0, 2.0, 9.0, 10.5, 10.6):
        if limit.allows(now):
            taken.append((now, limit.note(now)))
    assert taken == [(0.0, 0), (1.0, 0), (10.5, 2)]


def test_names_and_quota(tmp_path: Path) -> None:
    fired = Fired(parse_trigger("slower-than 1ms"), 0, vm="../we b\n3")
    at = datetime(2026, 11, 27, 20, 0, 0, tzinfo=UTC)
    names = []
    for age in range(4):
        name = name_of(fired, tmp_path, at)
        names.append(name)
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, ns=(age, age))
    assert names[0] == "kvmtrace-20261127T200000Z-.._we_b_3-slower-than.dat"
    assert len(set(names)) == 4
    (tmp_path / "other.dat").write_bytes(b"y" * 1000)
    (tmp_path / "kvmtrace-20261127T200000Z-link.dat").symlink_to("/etc/hostname")
    assert keep_quota(tmp_path, 250) == names[:2]
    assert keep_quota(tmp_path, 1) == [names[2]], "the newest stays"
    assert (tmp_path / "other.dat").exists()


def test_commands_end_and_begin_again() -> None:
    commands = Commands((parse_trigger("command false"), parse_trigger("command sleep 100")))
    fired: list[Fired] = []
    try:
        while not fired:
            fired = commands.look()
        assert [(one.trigger.text, one.detail) for one in fired] == [("command false", "status 1")]
    finally:
        commands.close()


TOLD: dict[str, Any] = {
    "kind": "slower-than", "trigger": "slower-than 1us:NPF", "pid": 300, "vm": "web-1", "reason": "npf",
    "dur_ns": 61 * MS,
}  # fmt: skip


def with_trigger(tmp_path: Path, **more: Any) -> Path:
    host = two_vms(SMP, tmp_path / "host.dat")
    return write_with_meta(host, read_meta(host) | {"triggers": [TOLD | more, {"kind": "signal"}]}, tmp_path / "t.dat")


def test_a_report_says_first_why_it_was_saved(tmp_path: Path) -> None:
    exits = build_report(open_recording(SMP)).slowest
    one = next(row for row in exits if row.vcpu_id == 0)
    path = with_trigger(tmp_path, tid=one.tid, began_ns=one.ts_ns + 900, ts_ns=one.ts_ns + one.dur_ns)
    report = build_report(open_recording(path))
    assert report.triggers[0].number == one.number
    sentence = saved_because(report)
    assert sentence.startswith(f"Saved because exit {one.number} (npf) of vCPU 0 of web-1 took 61.0ms")
    assert "1 more trigger followed" in sentence
    text = CliRunner().invoke(cli, ["report", str(path)], catch_exceptions=False).stdout
    assert text.splitlines()[2].startswith("Saved because exit")
    assert "web-1" not in saved_because(anonymized(report))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"kind": "run-delay", "dur_ns": 5 * MS, "tid": None, "vcpu_id": 3}, "vCPU 3 of web-1 waited 5.00ms for a CPU"),
        ({"kind": "rate", "value": 12345.0}, "npf exits of web-1 were 12,345 a second"),
        ({"kind": "slo", "value": 2e6}, "the quantile of npf exits of web-1 was 2.00ms"),
        ({"kind": "command", "detail": "status 0\x1b"}, r"a command ended, status 0\x1b"),
        (
            {"kind": "monitor", "tid": None, "vcpu_id": 3, "detail": "VM-entry, in state guest"},
            "vCPU 3 of web-1 took a step that the model does not allow: VM-entry, in state guest",
        ),
        ({"kind": "model"}, "what was recorded right after it was kept (model)"),  # it conforms
        ({"kind": "nonsense"}, "a trigger fired"),
    ],
)
def test_what_is_said_of_each_trigger(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    report = build_report(open_recording(with_trigger(tmp_path, **more)))
    assert saved_because(report).startswith(f"Saved because {words}")


def test_what_is_said_of_the_model_that_was_not_asked(tmp_path: Path) -> None:
    path = with_trigger(tmp_path, kind="model", tid=None)
    report = build_report(open_recording(path), ReportOptions(model=False))
    assert saved_because(report).startswith("Saved because it contradicts the reference model")


@pytest.mark.parametrize("triggers", [7, [7], [{}], [{"ts_ns": "x", "tid": -5, "value": float("nan")}], [TOLD] * 500])
def test_what_a_file_says_of_triggers_is_not_trusted(triggers: Any, tmp_path: Path) -> None:
    path = write_with_meta(SMP, read_meta(SMP) | {"triggers": triggers}, tmp_path / "bad.dat")
    saved_because(build_report(open_recording(path)))
    assert len(clean_meta({"triggers": triggers}).get("triggers") or []) <= 100


@pytest.mark.parametrize(
    "arguments", [[], ["-a"], ["-a", "--on", "x"], ["-a", "-p", "1", "--on", "model"], ["--on", "model"],
                  ["-a", "--on", "model", "--at-most", "x"]],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["watch", "-o", str(tmp_path), *arguments])
    assert result.exit_code == 2 or isinstance(result.exception, UsageError)


def test_what_was_overwritten_on_purpose_is_no_loss() -> None:
    text = "entries: 5\noverrun: 356965\ncommit overrun: 3\ndropped events: 1\n"
    assert without_overruns(text) == "entries: 5\noverrun: 0\ncommit overrun: 3\ndropped events: 1\n"
