"""`kvmtrace exporter`: counters per VM for Prometheus, from the summary maps; the host pays for those alone.

Names and units follow Prometheus' conventions; the number of series is bounded: per VM, not per vCPU unless asked, with
at most so many VMs and exit reasons by name, and VMs that are gone are dropped.
"""

from __future__ import annotations

import os
import platform
import select
import signal
import ssl
import threading
import time
from typing import IO, TYPE_CHECKING, Any

from kvmtrace import __version__
from kvmtrace.capture.bpf.monitor import describe_forbidden
from kvmtrace.errors import CapabilityError
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.watch.service import NOTICE, STOPS, Signals, notify, notify_reload, say
from kvmtrace.watch.vm_counters import OTHER, Counts, Totals, labels_of
from kvmtrace.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmtrace.capture.bpf.monitor import Monitor
    from kvmtrace.capture.bpf.summary_maps import SummaryPrograms
    from kvmtrace.watch.vm_counters import CountedVm, Key, VmCounters

TICK_S = 1.0
READ_EVERY_S = 60.0  # buckets of 32 bits cannot wrap in between
MOST_VMS, MOST_REASONS = 1000, 100  # with a name of their own
MOST_TOLD = 256  # forbidden steps
# le of the buckets: 2**i ns; below the first and above the last hardly anything lies
FIRST_BUCKET, LAST_BUCKET = 9, 31
MISSING = "the Python package prometheus_client is missing"
INSTALL = "pip install 'kvmtrace[exporter]'"


@dataclass(frozen=True)
class Watched:
    """The monitor in the kernel, and which rules its forbidden steps break.

    Parameters
    ----------
    monitor : Monitor of the whole machine
    rules : all rules that it watches
    rule_of : (state, step) -> the rule
    """

    monitor: Monitor
    rules: tuple[str, ...]
    rule_of: Callable[[str, str], str]


@dataclass(frozen=True)
class ExporterSettings:
    """What is exported, where and how.

    Parameters
    ----------
    listen : (host, port), or None
    textfile : file for the node exporter's collector, or None
    interval_s : between two writes of the textfile
    per_vcpu : tell vCPUs apart
    duration_s : end after so long, or None
    certificate, key : of the server (TLS), or None
    client_ca : whose clients alone are answered, or None
    """

    listen: tuple[str, int] | None
    textfile: Path | None
    interval_s: float
    per_vcpu: bool = False
    duration_s: float | None = None
    certificate: str | None = None
    key: str | None = None
    client_ca: str | None = None


def require_client() -> Any:
    """Return prometheus_client.

    Raises
    ------
    CapabilityError
        It is not installed.
    """
    try:
        import prometheus_client.core
    except ImportError as error:
        raise CapabilityError(MISSING, INSTALL) from error
    return prometheus_client


class VmCollector:
    """Makes the metrics when they are asked for; a custom collector of prometheus_client.

    Parameters
    ----------
    counters : VmCounters
    programs : SummaryPrograms
    per_vcpu : bool
    watched : Watched, or None
    """

    def __init__(
        self, counters: VmCounters, programs: SummaryPrograms, *, per_vcpu: bool = False, watched: Watched | None = None
    ) -> None:
        self.counters, self.programs, self.per_vcpu, self.watched = counters, programs, per_vcpu, watched
        self.lock = threading.Lock()

    def collect(self) -> Iterator[Any]:
        """Yield the metric families."""
        with self.lock:
            self.counters.update()
            vms = self.counters.vms()
            labels = labels_of(vms, MOST_VMS)
            sets = self._label_sets(vms, labels)
            yield from self._families(sets)
            yield from _info(vms, labels)
            yield from self._violations()
            yield from self._own()

    def describe(self) -> list[Any]:
        """Return nothing: what is collected is known when it is."""
        return []

    def _label_sets(self, vms: list[CountedVm], labels: dict[int, str]) -> dict[tuple[str, ...], Totals]:
        """Return the values of the labels that come first -> what was counted under them."""
        sets: dict[tuple[str, ...], Totals] = {}
        for place, vm in enumerate(vms):
            parts = vm.by_vcpu() if self.per_vcpu else {None: vm.all()}
            for vcpu_id, totals in parts.items():
                key = (labels[place], *(("unknown" if vcpu_id is None else str(vcpu_id),) if self.per_vcpu else ()))
                sets.setdefault(key, Totals()).add(totals)
        return sets

    def _families(self, sets: dict[tuple[str, ...], Totals]) -> Iterator[Any]:
        core = require_client().core
        first = ["vm", "vcpu"] if self.per_vcpu else ["vm"]
        exits = core.CounterMetricFamily("kvm_vm_exits", "VM-exits.", labels=[*first, "isa", "reason"])
        lasted = core.HistogramMetricFamily(
            "kvm_vm_exit_duration_seconds",
            "Time from a VM-exit to the next VM-entry.",
            labels=[*first, "isa", "reason"],
        )
        left = core.CounterMetricFamily("kvm_userspace_exits", "Returns of KVM_RUN.", labels=[*first, "reason"])
        away = core.HistogramMetricFamily(
            "kvm_userspace_exit_duration_seconds", "Time from a return of KVM_RUN to the next one's beginning.",
            labels=[*first, "reason"],
        )  # fmt: skip
        spent = core.CounterMetricFamily(
            "kvm_vcpu_time_seconds", "How the vCPUs' time was spent; the states add up to it.", labels=[*first, "state"]
        )
        delay = core.CounterMetricFamily(
            "kvm_vcpu_run_delay_seconds", "Time that vCPU threads waited for a CPU, runnable.", labels=first
        )
        for key, totals in sets.items():
            for (isa, reason), counts in _bounded(totals.exits).items():
                exits.add_metric([*key, isa, reason], counts.count)
                lasted.add_metric([*key, isa, reason], buckets_of(counts), counts.total_ns / 1e9)
            for (_, reason), counts in _bounded(totals.userspace_exits).items():
                left.add_metric([*key, reason], counts.count)
                away.add_metric([*key, reason], buckets_of(counts), counts.total_ns / 1e9)
            for state, ns in totals.time_ns.items():
                spent.add_metric([*key, state], ns / 1e9)
            delay.add_metric(key, totals.run_delay_ns / 1e9)
        yield from (exits, lasted, left, away, spent, delay)

    def _violations(self) -> Iterator[Any]:
        """Yield what the monitor has seen; nothing if there is none: no zero for what nobody looked at."""
        if self.watched is None:
            return
        counts = dict.fromkeys(self.watched.rules, 0)
        for (state, step), count in self.watched.monitor.forbidden().items():
            counts[self.watched.rule_of(state, step)] += count
        family = require_client().core.CounterMetricFamily(
            "kvm_model_violations", "Steps of vCPU threads that the reference model does not allow.", labels=["rule"]
        )
        for rule, count in counts.items():
            family.add_metric([rule], count)
        yield family

    def _own(self) -> Iterator[Any]:
        core = require_client().core
        lost = core.CounterMetricFamily(
            "kvmtrace_lost_events", "Events that were not counted: their program was skipped.", labels=["event"]
        )
        misses = self.programs.attached.misses()
        for event in self.programs.events:
            lost.add_metric([event.name], misses.get(event.name, 0))
        yield lost
        threads = core.GaugeMetricFamily("kvmtrace_vcpu_threads", "vCPU threads that are counted.")
        threads.add_metric([], self.counters.n_threads)
        yield threads
        limit = core.GaugeMetricFamily("kvmtrace_vcpu_threads_limit", "vCPU threads that can be counted at once.")
        limit.add_metric([], self.programs.max_threads)
        yield limit
        build = core.GaugeMetricFamily(
            "kvmtrace_build_info", "Version of kvmtrace, and of the kernel it runs on.", labels=["version", "kernel"]
        )
        build.add_metric([__version__, platform.release()], 1)
        yield build


def _info(vms: list[CountedVm], labels: dict[int, str]) -> Iterator[Any]:
    core = require_client().core
    names = ["vm", "pid", "program", "uuid", "unit", "pod", "namespace"]
    info = core.GaugeMetricFamily("kvm_vm_info", "Who a VM is; 1.", labels=names)
    vcpus = core.GaugeMetricFamily("kvm_vm_vcpus", "vCPU threads of a VM that have run.", labels=["vm"])
    running: dict[str, int] = {}
    for place, vm in enumerate(vms):
        running[labels[place]] = running.get(labels[place], 0) + len(vm.live)
        if labels[place] == OTHER:
            continue
        told = vm.identity
        words = (told.kind, told.uuid, told.unit, told.pod, told.namespace) if told else (None,) * 5
        info.add_metric([labels[place], str(vm.pid), *(word or "" for word in words)], 1)
    for label, count in running.items():
        vcpus.add_metric([label], count)
    yield info
    yield vcpus


def _bounded(counts: dict[Key, Counts]) -> dict[Key, Counts]:
    """Return the counts of at most MOST_REASONS reasons by name, the rest as one; which is a matter of their names."""
    if len(counts) <= MOST_REASONS:
        return counts
    kept: dict[Key, Counts] = {}
    for place, (key, one) in enumerate(sorted(counts.items())):
        name = key if place < MOST_REASONS else (key[0], OTHER)
        kept.setdefault(name, Counts()).add(one)
    return kept


def buckets_of(counts: Counts) -> list[tuple[str, float]]:
    """Return cumulated buckets with their upper bounds in seconds, +Inf last."""
    found = []
    total = sum(counts.buckets[: FIRST_BUCKET - 1])
    for bucket in range(FIRST_BUCKET - 1, LAST_BUCKET):
        total += counts.buckets[bucket]  # 2**bucket to 2**(bucket+1) - 1 ns
        found.append((repr((2 << bucket) / 1e9), float(total)))
    return [*found, ("+Inf", float(sum(counts.buckets)))]


class Exporter:
    """The running exporter: answers scrapes, writes the textfile, keeps the counters in order.

    Parameters
    ----------
    collector : VmCollector
    settings : ExporterSettings
    """

    def __init__(self, collector: VmCollector, settings: ExporterSettings) -> None:
        self.collector, self.settings = collector, settings
        client = require_client()
        self.registry = client.CollectorRegistry(auto_describe=False)
        self.registry.register(collector)
        client.ProcessCollector(registry=self.registry)
        self.server: Any = None
        self._written = self._read = float("-inf")
        self._told = 0

    def open(self) -> None:
        """Begin to answer.

        Raises
        ------
        CapabilityError
            The address is taken, or the certificate cannot be read.
        """
        if self.settings.listen is None:
            return
        host, port = self.settings.listen
        try:
            self.server, _ = require_client().start_http_server(
                port,
                host,
                registry=self.registry,
                certfile=self.settings.certificate,
                keyfile=self.settings.key,
                client_cafile=self.settings.client_ca,
                client_auth_required=self.settings.client_ca is not None,
            )
        except (OSError, ssl.SSLError) as error:
            problem = f"cannot listen on {host}:{port}: {error.strerror or error}"
            raise CapabilityError(problem, "choose another address with --listen, or check the certificate") from error

    def run(self, signals: Signals) -> None:
        """Work until a signal or the time ends it."""
        began = time.monotonic()
        while not self._ends(signals.take(), began):
            with self.collector.lock:
                self.collector.counters.tick(force=time.monotonic() > self._read + READ_EVERY_S)
                self._tell_violations()
            if time.monotonic() > self._read + READ_EVERY_S:
                self._read = time.monotonic()
            self._write_textfile()
            select.select([signals.fd], [], [], TICK_S)

    def _tell_violations(self) -> None:
        """Say the first forbidden steps of this run, each with the steps that led to it; all are counted."""
        if self.collector.watched is None:
            return
        for one in self.collector.watched.monitor.take_forbidden():
            if self._told < MOST_TOLD:
                say(describe_forbidden(one), NOTICE)
            self._told += 1

    def _ends(self, came: list[int], began: float) -> bool:
        if set(came) & set(STOPS):
            return True
        if signal.SIGHUP in came:
            self._reload()
        return self.settings.duration_s is not None and time.monotonic() - began > self.settings.duration_s

    def _reload(self) -> None:
        """Look at the VMs and the certificate again."""
        notify_reload()
        if self.server is not None and self.settings.certificate is not None:
            try:
                self.server.socket.context.load_cert_chain(self.settings.certificate, self.settings.key)
            except (OSError, ssl.SSLError) as error:
                say(f"the certificate stays as it was: {error}", NOTICE)
        self._read = float("-inf")
        say("reloaded")
        notify("READY=1")

    def _write_textfile(self) -> None:
        path = self.settings.textfile
        if path is None or time.monotonic() < self._written + self.settings.interval_s:
            return
        self._written = time.monotonic()
        write_textfile(path, self.registry)

    def close(self) -> None:
        """Answer no more; a textfile that nobody renews is removed."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
        if self.settings.textfile is not None:
            self.settings.textfile.unlink(missing_ok=True)


def write_textfile(path: Path, registry: Any) -> None:
    """Replace the file in one step; a disk that is full, for a while, is told and borne."""
    text = require_client().generate_latest(registry)

    def write(out: IO[bytes]) -> None:
        out.write(text)

    try:
        write_whole(path, write, lambda fd: os.fchmod(fd, 0o644))  # what a killed exporter left goes with it
    except OSError as error:
        say(f"{path}: {error.strerror}; the file is as it was", NOTICE)
