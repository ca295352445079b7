"""The exporter: what it says of known counts, in the formats that Prometheus reads; series are bounded and end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from kvmtrace.capture.running_vms import Vms
from kvmtrace.capture.vm_identity import VmIdentity, started_ticks
from kvmtrace.check.monitor_table import MONITORED_RULES, monitor_table
from kvmtrace.cli.main import cli
from kvmtrace.watch import prometheus_exporter as exporter_module
from kvmtrace.watch.prometheus_exporter import (
    Exporter,
    ExporterSettings,
    VmCollector,
    Watched,
    buckets_of,
    write_textfile,
)
from kvmtrace.watch.service import Signals
from kvmtrace.watch.vm_counters import Counts, VmCounters, labels_of
from tests.watch.fake_maps import HLT, NPF, FakePrograms, cell, ended_process, own_vcpu, vcpu

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parents[2] / "docs" / "prometheus"
RULES, DASHBOARD = DOCS / "kvmtrace.rules.yml", DOCS / "kvmtrace-dashboard.json"


class FakeVms(Vms):
    """Who the VMs are, as told."""

    def __init__(self, *identities: VmIdentity) -> None:
        super().__init__(None)
        self.known = {(one.pid, one.started_ticks): one for one in identities}

    def look(self, *, force: bool = False) -> None:
        """See nothing new."""


def own_vm(name: str = "web-3") -> VmIdentity:
    pid = os.getpid()
    return VmIdentity(pid, started_ticks(pid), kind="qemu", name=name, uuid="0f" * 16, unit="machine-qemu-1.scope")


def collector_of(
    programs: FakePrograms, *identities: VmIdentity, per_vcpu: bool = False, linger_s: float = 60.0
) -> VmCollector:
    counters = VmCounters(programs.snapshot, programs.forget, FakeVms(*identities), linger_s=linger_s)
    return VmCollector(counters, programs, per_vcpu=per_vcpu)  # type: ignore[arg-type]


def samples(collector: VmCollector) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


def value(collector: VmCollector, name: str, **labels: str) -> float | None:
    return samples(collector).get((name, frozenset(labels.items())))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(collector: VmCollector, **more: Any) -> Iterator[int]:
    running = Exporter(collector, ExporterSettings(("127.0.0.1", 0), None, 15.0, **more))
    running.open()
    assert running.server is not None
    try:
        yield running.server.server_port
    finally:
        running.close()


def get(url: str, accept: str = "", **more: Any) -> str:
    request = urllib.request.Request(url, headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=300, **more) as answer:
        text: str = answer.read().decode()
    return text


def test_counters_are_the_maps() -> None:
    programs = FakePrograms([own_vcpu(hlt=cell(10, 3000, exit_reason=HLT), npf=cell(4, 900, exit_reason=NPF))])
    collector = collector_of(programs, own_vm())
    assert value(collector, "kvm_vm_exits_total", vm="web-3", isa="svm", reason="hlt") == 10
    assert value(collector, "kvm_vm_exits_total", vm="web-3", isa="svm", reason="npf") == 4
    assert value(collector, "kvm_vm_exit_duration_seconds_sum", vm="web-3", isa="svm", reason="hlt") == 30e-6
    assert value(collector, "kvm_userspace_exits_total", vm="web-3", reason="KVM_EXIT_IO") == 7
    assert value(collector, "kvm_userspace_exits_total", vm="web-3", reason="EINTR") == 1
    assert value(collector, "kvm_vcpu_time_seconds_total", vm="web-3", state="vmm") == 1
    assert value(collector, "kvmtrace_lost_events_total", event="kvm_exit") == 2
    assert value(collector, "kvm_vm_vcpus", vm="web-3") == 1
    info = {"vm": "web-3", "pid": str(os.getpid()), "program": "qemu", "uuid": "0f" * 16, "pod": "", "namespace": ""}
    assert value(collector, "kvm_vm_info", unit="machine-qemu-1.scope", **info) == 1


def test_what_the_monitor_forbids_is_counted_by_rule() -> None:
    table = monitor_table()
    names = {step.kind: step.name for step in table.steps}
    forbidden = {("guest", names["kvm_entry"]): 3, (table.states[1], names["kvm_userspace_exit"]): 2}
    monitor = SimpleNamespace(forbidden=lambda: forbidden)
    collector = collector_of(FakePrograms([]))
    assert not [one for one, _ in samples(collector) if one.startswith("kvm_model")]
    collector.watched = Watched(monitor, MONITORED_RULES, table.rule_of)  # type: ignore[arg-type]
    assert value(collector, "kvm_model_violations_total", rule="V1") == 2
    assert value(collector, "kvm_model_violations_total", rule="V2") == 3
    forbidden.clear()
    assert value(collector, "kvm_model_violations_total", rule="V2") == 0


def test_vcpus_are_told_apart_when_asked() -> None:
    rows = [own_vcpu(3, hlt=cell(10, 3000, exit_reason=HLT))]
    found = samples(collector_of(FakePrograms(rows), own_vm(), per_vcpu=True))
    assert (
        "kvm_vm_exits_total",
        frozenset({("vm", "web-3"), ("vcpu", "3"), ("isa", "svm"), ("reason", "hlt")}),
    ) in found


def test_no_counter_goes_back() -> None:
    """An entry that is read while it changes may show less time than before."""
    programs = FakePrograms([own_vcpu()])
    collector = collector_of(programs, own_vm())
    before = value(collector, "kvm_vcpu_time_seconds_total", vm="web-3", state="guest")
    programs.rows[0]["time_ns"]["guest"] -= 5000
    assert value(collector, "kvm_vcpu_time_seconds_total", vm="web-3", state="guest") == before


def test_what_a_thread_counted_outlives_it() -> None:
    gone = vcpu(os.getpid(), 2**22 - 1, 1, hlt=cell(5, 100, exit_reason=HLT))
    programs = FakePrograms([own_vcpu(hlt=cell(10, 3000, exit_reason=HLT)), gone])
    collector = collector_of(programs, own_vm())
    for _ in range(2):
        assert value(collector, "kvm_vm_exits_total", vm="web-3", isa="svm", reason="hlt") == 15
    assert programs.forgotten == [2**22 - 1]


def test_two_hundred_vms_leave_nothing() -> None:
    programs = FakePrograms([])
    collector = collector_of(programs, linger_s=0.0)
    for number in range(200):
        pid = 2**22 - 300 + number  # no such process
        programs.rows.append(vcpu(pid, pid, hlt=cell(1, 100, exit_reason=HLT)))
        list(collector.collect())
    time.sleep(0.01)
    for _ in range(2):
        found = samples(collector)
    assert not [name for name, labels in found if "vm" in dict(labels)]
    assert len(programs.forgotten) == 200
    assert not programs.rows


def test_the_last_counts_of_a_vm_are_seen() -> None:
    pid = ended_process()
    collector = collector_of(FakePrograms([vcpu(pid, pid, hlt=cell(9, 10, exit_reason=HLT))]))
    for _ in range(2):
        assert value(collector, "kvm_vm_exits_total", vm=f"CPU 0/KVM {pid}", isa="svm", reason="hlt") == 9


def test_series_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter_module, "MOST_REASONS", 3)
    monkeypatch.setattr(exporter_module, "MOST_VMS", 1)
    many = {f"e{code}": cell(1, 100, exit_reason=code) for code in range(0x70, 0x7A)}
    other = {"x": cell(2, 100, exit_reason=HLT)}
    found = samples(collector_of(FakePrograms([own_vcpu(**many), vcpu(ended_process(), 5, **other)]), own_vm()))
    exits = {tuple(sorted(labels)): n for (name, labels), n in found.items() if name == "kvm_vm_exits_total"}
    assert sum(exits.values()) == 12
    assert len(exits) == 5
    assert {dict(labels)["vm"] for labels in exits} in ({"web-3", "other"}, {"other", "CPU 0/KVM 5"}) or len(exits) == 5


def test_buckets_of_32_bits_do_not_wrap() -> None:
    row = own_vcpu(hlt=cell((1 << 32) - 5, 3000, exit_reason=HLT))
    programs = FakePrograms([row])
    collector = collector_of(programs, own_vm())
    list(collector.collect())
    row["exits"] = [cell((1 << 32) + 7, 3000, exit_reason=HLT)]
    assert row["exits"][0]["buckets"][11] == 7
    labels = {"vm": "web-3", "isa": "svm", "reason": "hlt"}
    assert value(collector, "kvm_vm_exit_duration_seconds_count", **labels) == (1 << 32) + 7


def test_vms_of_one_name_are_told_apart() -> None:
    from kvmtrace.watch.vm_counters import CountedVm

    vms = [CountedVm(pid, 1, "q", VmIdentity(pid, 1, name="a")) for pid in (7, 8)] + [CountedVm(9, 1, "q")]
    assert labels_of(vms, 2) == {0: "a (7)", 1: "a (8)", 2: "other"}


def test_quantiles_lie_in_their_bucket() -> None:
    counts = Counts()
    for ns, n in ((700, 5), (3000, 90), (1_000_000, 5)):
        counts.add(Counts(n, n * ns, cell(n, ns)["buckets"]))
    bounds = [(float(bound), n) for bound, n in buckets_of(counts)]
    assert [n for _, n in bounds] == sorted(n for _, n in bounds)
    assert bounds[-1] == (float("inf"), 100)
    median = next(bound for bound, n in bounds if n >= 50)
    assert median / 2 <= 3e-6 <= median
    assert buckets_of(Counts())[-1] == ("+Inf", 0.0)


@pytest.fixture
def busy() -> VmCollector:
    exits = {"hlt": cell(10, 3000, exit_reason=HLT), "npf": cell(4, 900, exit_reason=NPF),
             "odd": cell(1, 2**31, exit_reason=0x4FF)}  # fmt: skip
    collector = collector_of(FakePrograms([own_vcpu(**exits)]), own_vm('we"b\\3\n'))
    monitor = SimpleNamespace(forbidden=dict, take_forbidden=list)
    collector.watched = Watched(monitor, MONITORED_RULES, monitor_table().rule_of)  # type: ignore[arg-type]
    return collector


def test_both_formats_are_read_back(busy: VmCollector) -> None:
    with serving(busy) as port:
        url = f"http://127.0.0.1:{port}/metrics"
        plain, opened = get(url), get(url, "application/openmetrics-text; version=1.0.0")
    assert opened.endswith("# EOF\n")
    for families in (list(read_text(plain)), list(read_openmetrics(opened))):
        found = {s.name: s for family in families for s in family.samples if s.labels.get("reason") == "hlt"}
        assert found["kvm_vm_exits_total"].value == 10
        assert found["kvm_vm_exits_total"].labels["vm"] == 'we"b\\3?'


def test_promtool_finds_nothing_wrong(busy: VmCollector) -> None:
    with serving(busy) as port:
        text = get(f"http://127.0.0.1:{port}/metrics")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if line.startswith("kvm")]
    assert not ours
    subprocess.run(["promtool", "check", "rules", str(RULES)], check=True, capture_output=True)


def queries() -> list[str]:
    """Return what the dashboard and the rules ask."""
    text = DASHBOARD.read_text()
    asked = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    rules = re.findall(r"expr: (?!>-)(.*)$", RULES.read_text(), re.MULTILINE)
    return [*asked, *rules]


def test_the_dashboard_names_what_is_exported(busy: VmCollector) -> None:
    exported = {sample.name for family in busy.collect() for sample in family.samples} | {"process_cpu_seconds_total"}
    recorded = set(re.findall(r"record: (\S+)", RULES.read_text()))
    for query in queries():
        names = set(re.findall(r"\b(?:vm\w*:[\w:]+|(?:kvm|process)\w+_\w+)(?=[{\[ )]|$)", query))
        assert names
        assert names <= exported | recorded, query


@contextlib.contextmanager
def prometheus(tmp_path: Path, target: int) -> Iterator[str]:
    """Run a real Prometheus that scrapes a port of this machine; yield its address."""
    config = {
        "global": {"scrape_interval": "200ms", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "kvmtrace", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
         f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=log, cwd=tmp_path,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: ask(address, "up") == [1.0], 300)
        yield address
    finally:
        server.kill()
        server.wait()
        log.close()


def ask(address: str, query: str) -> list[float] | None:
    """Return the values of a query, None if nobody answers."""
    from urllib.error import URLError
    from urllib.parse import urlencode

    try:
        answer = json.loads(get(f"{address}/api/v1/query?{urlencode({'query': query})}"))
    except (URLError, ConnectionError):
        return None
    assert answer["status"] == "success", answer
    return [float(row["value"][1]) for row in answer["data"]["result"]]


def wait_for(condition: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)


def test_a_real_prometheus_answers_every_query(busy: VmCollector, tmp_path: Path) -> None:
    with serving(busy) as port, prometheus(tmp_path, port) as address:
        assert ask(address, 'kvm_vm_exits_total{reason="hlt"}') == [10.0]
        wait_for(lambda: ask(address, "count_over_time(up[1m])") >= [5.0], 300)  # type: ignore[operator]
        for query in queries():
            text = query.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$vm", ".*")
            found = ask(address, text)
            assert found is not None
            assert found or re.search(r"[<>]=? *[\d.]|kvmtrace_vcpu_threads >", text) or ":" in text, text
        wait_for(lambda: ask(address, "vm:kvm_vm_exits:rate5m"), 300)


def certificate(tmp_path: Path) -> tuple[str, str]:
    made = tmp_path / "host.crt", tmp_path / "host.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", made[0], "-keyout", made[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return str(made[0]), str(made[1])


def test_tls_and_client_certificates(busy: VmCollector, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    context = ssl.create_default_context(cafile=cert)
    with serving(busy, certificate=cert, key=key) as port:
        assert "kvm_vm_exits_total" in get(f"https://localhost:{port}/metrics", context=context)
    with serving(busy, certificate=cert, key=key, client_ca=cert) as port:
        with pytest.raises(OSError):  # noqa: PT011 (the handshake's or the first read's)
            get(f"https://localhost:{port}/metrics", context=context)
        context.load_cert_chain(cert, key)
        assert "kvm_vm_exits_total" in get(f"https://localhost:{port}/metrics", context=context)


def test_the_textfile_is_whole_and_goes(busy: VmCollector, tmp_path: Path) -> None:
    path = tmp_path / "kvmtrace.prom"
    (tmp_path / ".kvmtrace.prom.kvmtrace-out-4194305").write_text("of one that was killed as it renamed it")
    running = Exporter(busy, ExporterSettings(None, path, 15.0))
    write_textfile(path, running.registry)
    assert any(family.name == "kvm_vm_exits" for family in read_text(path.read_text()))
    assert [one.name for one in tmp_path.iterdir()] == ["kvmtrace.prom"]
    assert path.stat().st_mode & 0o777 == 0o644
    running.close()
    assert not path.exists()


def test_a_textfile_that_cannot_be_written_is_told(
    busy: VmCollector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_textfile(tmp_path / "gone" / "x.prom", Exporter(busy, ExporterSettings(None, None, 1.0)).registry)
    assert "No such file" in capsys.readouterr().err


def test_signals_end_and_reload(busy: VmCollector, capsys: pytest.CaptureFixture[str]) -> None:
    running = Exporter(busy, ExporterSettings(None, None, 15.0))
    with Signals(signal.SIGHUP) as signals:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGHUP)).start()
        threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        running.run(signals)
    assert "reloaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--no-listen"], ["--listen", "x"], ["--listen", "1.2.3.4:99999"], ["--tls-cert", __file__],
                  ["--client-ca", __file__]],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["exporter", *arguments]).exit_code != 0


def test_a_taken_address_is_told(busy: VmCollector) -> None:
    from kvmtrace.errors import CapabilityError

    with serving(busy) as port, pytest.raises(CapabilityError, match="cannot listen on"):
        Exporter(busy, ExporterSettings(("127.0.0.1", port), None, 15.0)).open()


def test_the_exporter_loads_no_numpy() -> None:
    modules = "sys, kvmtrace.cli.exporter, kvmtrace.watch.prometheus_exporter, kvmtrace.capture.bpf.summary_maps"
    code = f"import {modules}; sys.exit(bool({{'numpy', 'pandas'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
