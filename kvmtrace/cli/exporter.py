"""`kvmtrace exporter`: counters of the machine's VMs for Prometheus."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmtrace.cli.output import check_output
from kvmtrace.cli.parameter_types import VM_HELP, Address, Duration
from kvmtrace.errors import CapabilityError, UsageError

if TYPE_CHECKING:
    from kvmtrace.watch.prometheus_exporter import Watched

EPILOG = """\b
Examples:
  kvmtrace exporter
  kvmtrace exporter --textfile /var/lib/prometheus/node-exporter/kvmtrace.prom --no-listen
  kvmtrace exporter --listen 10.0.0.5:9794 --tls-cert host.crt --tls-key host.key --client-ca prometheus.crt

Metrics: kvm_vm_exits_total{vm,isa,reason}, kvm_vm_exit_duration_seconds, kvm_userspace_exits_total{vm,reason},
kvm_vcpu_time_seconds_total{vm,state} and others; docs/exporter.md has them all, a Grafana dashboard and alert rules.

SIGHUP looks at VMs and certificates again. Ending it leaves nothing behind.
"""


@click.command("exporter", epilog=EPILOG)
@click.option(
    "--listen",
    type=Address(),
    default="127.0.0.1:9794",
    show_default=True,
    metavar="HOST:PORT",
    help="Where scrapes are answered, in the text and the OpenMetrics format.",
)
@click.option("--no-listen", is_flag=True, help="Answer nobody; with --textfile.")
@click.option(
    "--textfile",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the metrics to FILE too, for the node exporter's textfile collector (*.prom).",
)
@click.option(
    "--interval",
    type=Duration(),
    default="15",
    show_default=True,
    metavar="TIME",
    help="Between two writes of the textfile.",
)
@click.option("--vm", metavar="NAME|UUID", help=VM_HELP)
@click.option(
    "--monitor",
    is_flag=True,
    help="Step the reference model for each vCPU thread in the kernel, too: kvm_model_violations_total{rule}.",
)
@click.option("--per-vcpu", is_flag=True, help="Tell vCPUs apart: a label more, and as many times more series.")
@click.option(
    "--max-vcpus",
    type=click.IntRange(1, 1 << 16),
    default=512,
    show_default=True,
    help="vCPU threads that can be counted at once; each takes 50 KB of kernel memory.",
)
@click.option(
    "--linger",
    type=Duration(),
    default="60",
    show_default=True,
    metavar="TIME",
    help="How long the counters of a VM that has ended stay: longer than between two scrapes.",
)
@click.option("--tls-cert", type=click.Path(exists=True, dir_okay=False), help="Certificate: answer by HTTPS.")
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False), help="The certificate's key.")
@click.option(
    "--client-ca",
    type=click.Path(exists=True, dir_okay=False),
    help="Answer only clients with a certificate of this authority.",
)
@click.option("-d", "--duration", type=Duration(), help="End after so long.")  # fmt: skip
def command(**options: Any) -> None:
    """Serve counters of the machine's VMs to Prometheus.

    VM-exits, userspace exits and the vCPUs' time are counted by BPF programs in maps of the kernel; no event is sent.
    """
    from kvmtrace.capture.bpf.detach import closing_elsewhere
    from kvmtrace.capture.bpf.summary_maps import SummaryPrograms
    from kvmtrace.capture.pid_namespace import require_initial
    from kvmtrace.capture.running_vms import Vms
    from kvmtrace.watch.prometheus_exporter import Exporter, VmCollector, require_client
    from kvmtrace.watch.service import Signals, notify, say
    from kvmtrace.watch.vm_counters import VmCounters

    settings = settings_of(options)
    require_client()
    require_initial("the exporter", "kvmtrace top")
    with Signals(signal.SIGHUP) as signals:
        programs = SummaryPrograms(None, max_threads=options["max_vcpus"])
        watched = None
        try:
            watched = watch_the_model() if options["monitor"] else None
            programs.attach()
            counters = VmCounters(
                programs.snapshot, programs.forget, Vms(None), wanted=options["vm"], linger_s=options["linger"]
            )
            collector = VmCollector(counters, programs, per_vcpu=settings.per_vcpu, watched=watched)
            exporter = Exporter(collector, settings)
            exporter.open()
            try:
                say(f"exporting {where(settings)}")
                notify("READY=1")
                exporter.run(signals)
            finally:
                notify("STOPPING=1")
                exporter.close()
        finally:
            with closing_elsewhere():
                if watched is not None:
                    watched.monitor.close()
                programs.close()


def watch_the_model() -> Watched:
    """Attach the monitor of `record --monitor` to the whole machine."""
    from kvmtrace.capture.bpf.monitor import Monitor
    from kvmtrace.check.monitor_table import MONITORED_RULES, monitor_table
    from kvmtrace.watch.prometheus_exporter import Watched

    table = monitor_table(os.uname().release)
    monitor = Monitor(table, None)
    try:
        monitor.start()
    except BaseException:
        monitor.close()
        raise
    return Watched(monitor, MONITORED_RULES, table.rule_of)


def settings_of(options: dict[str, Any]) -> Any:
    """Return what the options ask for.

    Raises
    ------
    UsageError
        They contradict each other.
    CapabilityError
        The textfile's directory does not exist.
    """
    from kvmtrace.watch.prometheus_exporter import ExporterSettings

    if options["no_listen"] and options["textfile"] is None:
        raise UsageError("--no-listen without --textfile exports nothing")
    if bool(options["tls_cert"]) != bool(options["tls_key"]):
        raise UsageError("--tls-cert and --tls-key belong together")
    if options["client_ca"] and not options["tls_cert"]:
        raise UsageError("--client-ca needs --tls-cert and --tls-key")
    textfile = options["textfile"]
    if textfile is not None:
        _check_textfile(textfile)
    return ExporterSettings(
        listen=None if options["no_listen"] else options["listen"],
        textfile=textfile,
        interval_s=options["interval"],
        per_vcpu=options["per_vcpu"],
        duration_s=options["duration"],
        certificate=options["tls_cert"],
        key=options["tls_key"],
        client_ca=options["client_ca"],
    )


def _check_textfile(path: Path) -> None:
    """Refuse a file that would be lost: it is replaced at each turn, and removed at the end."""
    if not path.parent.is_dir():
        raise CapabilityError(f"{path.parent}: no such directory", "make it, or choose another place")
    check_output(path)
    if path.suffix != ".prom":
        raise UsageError(f"--textfile {path}: the collector reads *.prom alone")


def where(settings: Any) -> str:
    """Say where the metrics can be had."""
    places = []
    if settings.listen is not None:
        host, port = settings.listen
        scheme = "https" if settings.certificate else "http"
        places.append(f"at {scheme}://{f'[{host}]' if ':' in host else host}:{port}/metrics")
    if settings.textfile is not None:
        places.append(f"to {settings.textfile} every {settings.interval_s:g} s")
    return " and ".join(places)
