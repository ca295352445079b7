"""The HTML report in a real browser: sorting, filtering, zoom, no script errors; and nothing from a trace is markup."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmtrace.formats import open_recording
from kvmtrace.render.html import render_html
from kvmtrace.report.build import ReportOptions, build_report

FIXTURES = Path(__file__).parents[2] / "fixtures"
HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>\x1b[31m'
# the page's own script has run; this one presses its buttons and leaves what it saw in the title
PROBE = """
<script>
window.errors = [];
window.addEventListener("error", (event) => window.errors.push(String(event.message)));
</script>
"""
DRIVER = """
<script>
(async () => {
const seen = {};
const drawn = document.getElementById("timeline");
for (let i = 0; i < 200 && drawn.dataset.ready !== "yes"; i++) await new Promise((done) => setTimeout(done, 10));
const rows = (id) => [...document.querySelectorAll(`#${id} tbody tr`)].filter((row) => !row.hidden);
const column = (id, i) => rows(id).map((row) => row.cells[i].textContent);
const head = document.querySelectorAll("#exits thead button")[2];
head.click(); seen.descending = column("exits", 2); seen.sort = head.parentElement.getAttribute("aria-sort");
head.click(); seen.ascending = column("exits", 2);
const filter = document.querySelector("input[data-filter=steps]");
filter.value = "KVM_CREATE"; filter.dispatchEvent(new Event("input")); seen.filtered = column("steps", 3);
const canvas = document.getElementById("timeline");
const span = () => Number(canvas.dataset.to) - Number(canvas.dataset.from);
seen.all = span();
document.querySelector("[data-zoom='0.5']").click(); seen.zoomed = span();
canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" })); seen.home = span();
const picker = document.getElementById("timeline-exit");
picker.value = "0"; picker.dispatchEvent(new Event("change"));
seen.details = document.getElementById("timeline-details").textContent; seen.at = span();
const find = document.getElementById("timeline-search");
find.value = "3"; document.getElementById("timeline-next").click();
seen.third = document.getElementById("timeline-details").textContent;
find.value = "hlt"; document.getElementById("timeline-next").click();
seen.reason = document.getElementById("timeline-details").textContent;
location.hash = document.querySelector("#slowest a").getAttribute("href");
await new Promise((done) => setTimeout(done, 50));
seen.linked = document.getElementById("timeline-details").textContent;
seen.slowest = document.querySelector("#slowest a").textContent;
seen.errors = window.errors;
const out = document.createElement("pre");
out.id = "seen"; out.textContent = JSON.stringify(seen);
document.body.append(out);
})();
</script>
</body>"""


@pytest.fixture(scope="module")
def report():
    return build_report(open_recording(FIXTURES / "svm-6.1-lifecycle.dat"), ReportOptions(timeline=True))


@pytest.fixture(scope="module")
def page(report) -> str:
    return render_html(report)


def browse(text: str, tmp_path: Path) -> str:
    """Return the page's DOM after its scripts ran, from headless Chromium."""
    chromium = shutil.which("chromium")
    assert chromium, "chromium is missing: make setup"
    file = tmp_path / "page.html"
    file.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    return done.stdout


def test_page_is_self_contained(page: str) -> None:
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "@import" not in page
    assert len(page) < 3_000_000


def test_numbers_are_those_of_the_document(page: str, report) -> None:
    for row in report.exits:
        assert html.escape(row.name) in page
        assert f'data-v="{row.total_ns}"' in page


@pytest.mark.browser
def test_sorting_filtering_and_zoom_in_a_browser(page: str, tmp_path: Path) -> None:
    driven = page.replace("<style>", PROBE + "<style>", 1).replace("</body>", DRIVER)
    dom = browse(driven, tmp_path)
    match = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert match, "the driver did not finish"
    seen = json.loads(html.unescape(match[1]))
    assert seen["errors"] == []
    counts = [int(text.replace(",", "")) for text in seen["descending"]]
    assert counts == sorted(counts, reverse=True)
    assert seen["sort"] == "descending"
    assert seen["ascending"] == seen["descending"][::-1] or sorted(counts) == [
        int(text.replace(",", "")) for text in seen["ascending"]
    ]
    assert seen["filtered"]
    assert all("KVM_CREATE" in text for text in seen["filtered"])
    assert seen["zoomed"] == pytest.approx(seen["all"] / 2)
    assert seen["home"] == pytest.approx(seen["all"])
    assert seen["at"] < seen["all"]
    assert "for" in seen["details"]
    assert ": VM-exit 3, " in seen["third"]
    assert ", hlt, " in seen["reason"]
    assert f": VM-exit {seen['slowest']}, " in seen["linked"]


@pytest.mark.browser
def test_names_from_a_trace_are_text(report, tmp_path: Path) -> None:
    vcpus = tuple(dataclasses.replace(vcpu, comm=HOSTILE) for vcpu in report.vcpus)
    lanes = tuple(dataclasses.replace(lane, label=HOSTILE) for lane in report.timeline.lanes)
    timeline = dataclasses.replace(report.timeline, lanes=lanes)
    capture = dataclasses.replace(report.capture, path=HOSTILE, host=HOSTILE, kernel=HOSTILE)
    hostile = dataclasses.replace(report, vcpus=vcpus, capture=capture, timeline=timeline)
    text = render_html(hostile)
    assert "<img src=x" not in text
    assert "\x1b" not in text
    dom = browse(text, tmp_path)
    assert "<title>owned</title>" not in dom


def test_a_report_without_anything_is_a_page(report) -> None:
    empty = dataclasses.replace(
        report, exits=(), userspace_exits=(), vcpus=(), timeline=None, model=None, bring_up=None, rate=None
    )
    assert "</html>" in render_html(empty)
