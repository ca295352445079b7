"""VMs by name, and findings of summaries that older versions wrote."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fleet.generator import KERNELS, MODELS, make_host
from fleet.real_sources import FAULTY
from kvmtrace.fleet.fleet_report import build_fleet_report
from kvmtrace.fleet.host_metrics import ALONE, METRICS, host_metrics, vm_metrics
from kvmtrace.fleet.reduce import Fleet
from kvmtrace.fleet.store import Store
from kvmtrace.fleet.summarize import summarize
from kvmtrace.fleet.summary_schema import SUMMARY
from kvmtrace.render.text.fleet_text import describe_command

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


def host(number: int) -> dict[str, Any]:
    return make_host(number, MODELS[0], KERNELS[0], np.random.default_rng(number))


def test_a_vm_is_known_by_its_name_over_recordings(tmp_path: Path) -> None:
    first, later = host(24), host(24)
    for row, checksum, pids in ((first, "a", (10, 11, 12)), (later, "b", (20, 21, 22))):
        row["checksum"] = checksum * 64
        for vm, name, pid in zip(row["vms"], ("db", "web", "web"), pids, strict=True):
            before = vm["pid"]
            vm |= {"pid": pid, "name": name}
            for exits in row["exits"]:
                exits["vm_pid"] = pid if exits["vm_pid"] == before else exits["vm_pid"]
            for vcpu in row["vcpus"]:
                vcpu["vm_pid"] = pid if vcpu["vm_pid"] == before else vcpu["vm_pid"]
        Store(str(tmp_path)).write_summary(row)
    with Fleet(str(tmp_path)) as fleet:
        hosts = host_metrics(fleet)
        vms = vm_metrics(fleet, hosts)
    assert vms is not None
    assert set(vms.vm) == {"db", *(f"web (pid {pid})" for pid in (11, 12, 21, 22))}
    assert vms.count.sum() == hosts.count.sum()
    assert set(hosts.vm) == {None}


def test_hosts_of_one_vm_are_not_told_twice(tmp_path: Path) -> None:
    Store(str(tmp_path)).write_summary(host(6))
    with Fleet(str(tmp_path)) as fleet:
        assert vm_metrics(fleet, host_metrics(fleet)) is None


def test_a_vm_that_is_alone_is_a_peer_of_others(tmp_path: Path) -> None:
    for number in (6, 24):
        Store(str(tmp_path)).write_summary(host(number))
    with Fleet(str(tmp_path)) as fleet:
        hosts = host_metrics(fleet)
        vms = vm_metrics(fleet, hosts)
    assert vms is not None
    lone = vms.host == "host-00006"
    assert set(vms.vm[lone]) == {ALONE}
    assert set(vms.vm[~lone]) == {f"web-24-{place}" for place in range(3)}
    for name in METRICS:
        np.testing.assert_array_equal(vms.values[name][lone], hosts.values[name][hosts.host == "host-00006"])


@pytest.mark.parametrize("older", [False, True])
def test_a_finding_of_an_older_version_names_the_recording(tmp_path: Path, older: bool) -> None:
    path = FAULTY / "svm-hyper-v-ud-address.dat"
    row, schema = summarize(path, str(path)), SUMMARY
    if older:
        place = schema.get_field_index("findings")
        members = [field for field in schema.field(place).type.value_type if field.name != "vm_exit"]
        schema = schema.set(place, pa.field("findings", pa.list_(pa.struct(members))))
    folder = tmp_path / "summaries" / "day=x"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row], schema=schema), folder / f"{row['checksum']}.parquet")
    with Fleet(str(tmp_path)) as fleet:
        (finding,) = build_fleet_report(fleet).findings
    words = shlex.split(describe_command(finding))
    assert words == (["kvmtrace", "check", str(path)] if older else [
        "kvmtrace", "report", str(path), "--explain", str(finding.vm_exit), "--tid", str(finding.tid),
    ])  # fmt: skip
