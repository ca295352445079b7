"""The fleet's page in a browser: it shows every host, sorts and searches without errors, and stays small."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import pytest
from chromium import Browser

from fleet.generator import make_fleet
from kvmtrace.fleet.fleet_report import build_fleet_report
from kvmtrace.fleet.reduce import Fleet
from kvmtrace.render.html.fleet_page import render_fleet_html

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 5_000_000
REDUCE_S = 20  # of 10,000 hosts, in CPU time
SHOWN = "document.getElementById('heat-shown').textContent"
SET = (
    "(([id, value]) => {{ const e = document.getElementById(id); e.value = value;"
    " for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {{bubbles: true}})); }})(['{0}', '{1}'])"
)


@pytest.mark.browser
@pytest.mark.parametrize("n_hosts", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_page(n_hosts: int, tmp_path: Path) -> None:
    assert shutil.which("chromium")
    make_fleet(tmp_path / "dest", n_hosts, seed=3)
    begin = time.process_time()
    with Fleet(str(tmp_path / "dest")) as fleet:
        document = build_fleet_report(fleet, ("kernel", "cpu_model"), None)
        (host,) = fleet.arrow("SELECT min(host) AS host FROM recordings").to_pylist()
    assert time.process_time() - begin < REDUCE_S * 2  # two processors take part
    page = render_fleet_html(document)
    assert len(page.encode()) < MAX_BYTES
    path = tmp_path / "fleet.html"
    path.write_text(page)
    with Browser(tmp_path) as browser:
        shown = browser.open(f"file://{path}")
        shown.wait(f"{SHOWN} === '{n_hosts} hosts'")
        options = shown.see("[...document.getElementById('heat-sort').options].map(o => o.value)")
        assert len(options) > 3
        began = time.monotonic()
        for option in options[:4]:
            shown.see(SET.format("heat-sort", option))
        shown.see("document.getElementById('heat-frame').scrollTop = 1e7")
        shown.see(SET.format("heat-search", host["host"]))
        shown.wait(f"parseInt({SHOWN}) > 0 && {SHOWN}.endsWith('of {n_hosts} hosts')")
        shown.see(SET.format("heat-search", "no such host"))
        shown.wait(f"{SHOWN}.startsWith('0')")
        assert time.monotonic() - began < 30
        problems = [
            event for event in browser.events if event.get("method") in {"Runtime.exceptionThrown", "Log.entryAdded"}
        ]
    assert problems == []
