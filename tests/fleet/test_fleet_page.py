"""The pages of `fleet report` and `compare` in a real browser: charts with legends, no complaint, nothing too wide."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from chromium import Browser

FIXTURES = Path(__file__).parents[2] / "fixtures"
RUNS = [str(FIXTURES / f"svm-{kernel}-lifecycle.dat") for kernel in ("6.1", "6.12")]

pytestmark = pytest.mark.browser


def kvmtrace(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "kvmtrace", *args], check=True, capture_output=True, timeout=300)


def test_pages(tmp_path: Path) -> None:
    fleet, comparison = tmp_path / "fleet.html", tmp_path / "compare.html"
    kvmtrace("fleet", "summarize", *RUNS, "--workers", "1", "-o", str(tmp_path / "summaries"))
    kvmtrace("fleet", "report", str(tmp_path / "summaries"), "--format", "html", "-o", str(fleet))
    kvmtrace("compare", *RUNS, "--format", "html", "-o", str(comparison))
    with Browser(tmp_path) as browser:
        for file in (fleet, comparison):
            for width, dark in ((500, True), (1280, False)):
                page = browser.open(file.as_uri(), width, dark=dark)
                charts = "[...document.querySelectorAll('figure[data-chart]')]"
                page.wait(f"{charts}.every((one) => one.dataset.ready === 'yes')")
                assert page.see("document.documentElement.scrollWidth") == width
                assert page.troubles() == []
                if file == fleet:
                    assert page.see(f"{charts}.length") > 3
                    legend = page.see("document.querySelector('.u-legend').textContent")
                    assert "AMD EPYC Processor" in legend
                    page.see("location.hash = '#host=no%20such%20host'")
                    page.wait("document.getElementById('heat-shown').textContent.startsWith('0 of ')")
