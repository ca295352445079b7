"""From and to S3: a real S3 API server on the loopback."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fleet.s3_server import s3_server
from kvmtrace.fleet.executors import Engine
from kvmtrace.fleet.fleet_report import build_fleet_report
from kvmtrace.fleet.reduce import Fleet
from kvmtrace.fleet.sources import find_sources
from kvmtrace.fleet.summarizing import summarize_all

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
FILES = ("svm-6.1-interrupt.dat", "vmx-6.1-interrupt.dat")


@pytest.fixture
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as files:
        files.mkdir("traces")
        files.mkdir("summaries")
        for name in FILES:
            files.put_file(str(ROOT / "fixtures" / name), f"traces/day1/{name}")
        files.pipe_file("traces/day1/damaged.dat", b"\x17\x08\x44tracing6")
        yield "s3://traces"


def test_summarise_and_report_from_and_to_s3(bucket: str, tmp_path: Path) -> None:
    sources = find_sources([f"{bucket}/day1/"])
    assert [source.rsplit("/", 1)[-1] for source in sources] == ["damaged.dat", *FILES]
    progress = summarize_all(Engine(workers=2), sources, "s3://summaries/fleet")
    assert progress.counts == {"made": 2, "failed": 1}
    assert summarize_all(Engine(workers=1), sources, "s3://summaries/fleet").counts == {"present": 2, "failed": 1}
    local = [str(ROOT / "fixtures" / name) for name in FILES]
    summarize_all(Engine(workers=1), local, str(tmp_path))
    with Fleet("s3://summaries/fleet") as remote, Fleet(str(tmp_path)) as here:
        report, expected = build_fleet_report(remote), build_fleet_report(here)
    assert report.groups == expected.groups
    assert report.n_failures == 1
    assert report.failures[0]["kind"] == "FormatError"
