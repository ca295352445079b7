"""The HTML report in a real browser: three widths, both schemes, print, keys alone; nothing from a trace is markup."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chromium import Browser, Page

import kvmtrace.report.timeline
from kvmtrace.formats import open_recording
from kvmtrace.render.html import render_html
from kvmtrace.report.build import ReportOptions, build_report

if TYPE_CHECKING:
    from kvmtrace.report.document import Report

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>\x1b[31m'
# elements that reach out of the window, other than those that scroll by themselves
TOO_WIDE = """[...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest(".scroll, pre, .diagram, .skip")).map((e) => `${e.tagName}.${e.className}`)"""


def made(name: str, **options: object) -> Report:
    return build_report(open_recording(FIXTURES / name), ReportOptions(timeline=True, **options))


@pytest.fixture(scope="module")
def report() -> Report:
    return made("svm-6.1-lifecycle.dat")


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render_html(report)


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of the page of a Linux boot with two vCPUs."""
    file = tmp_path_factory.mktemp("page") / "linux.html"
    file.write_text(render_html(made("svm-6.12-linux-2vcpu.dat")), encoding="utf-8")
    return file.as_uri()


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of the page of a recording that is taken for a long one."""
    file = tmp_path_factory.mktemp("page") / "long.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvmtrace.report.timeline, "MAX_SEGMENTS", 1000)
        file.write_text(render_html(made("svm-6.12-linux-2vcpu.dat")), encoding="utf-8")
    return file.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with Browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


def ready(browser: Browser, url: str, width: int = 1280, *, dark: bool = False) -> Page:
    page = browser.open(url, width, dark=dark)
    page.wait("document.getElementById('timeline').dataset.ready === 'yes'")
    return page


def shown(page: Page) -> tuple[float, float]:
    """Return the stretch of time that the timeline shows."""
    return tuple(page.see("(({from, to}) => [Number(from), Number(to)])(document.getElementById('timeline').dataset)"))


def said(page: Page) -> str:
    return page.see("document.getElementById('timeline-details').textContent")


def find(page: Page, words: str) -> str:
    page.see(f"document.getElementById('timeline-search').value = '{words}'")
    page.see("document.getElementById('timeline-details').textContent = ''")
    page.see("document.getElementById('timeline-next').click()")  # keys and clicks have tests of their own
    page.wait("document.getElementById('timeline-details').textContent !== ''")
    return said(page)


def test_page_is_self_contained(page: str) -> None:
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "@import" not in page
    assert "connect-src" not in page
    assert len(page) < 3_000_000


def test_the_chart_library_keeps_its_licence(page: str) -> None:
    assert "Copyright (c) 2022 Leon Sorokin" in page
    assert "The above copyright notice and this permission notice shall be included" in page


def test_numbers_are_those_of_the_document(page: str, report: Report) -> None:
    for row in report.exits:
        assert html.escape(row.name) in page
        assert f'data-v="{row.total_ns}"' in page


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(500, False), (500, True), (900, True), (1280, False)])
def test_nothing_is_wider_than_the_window(browser: Browser, linux: str, width: int, dark: bool) -> None:
    page = ready(browser, linux, width, dark=dark)
    page.see("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.wait("[...document.querySelectorAll('figure[data-chart]')].every((one) => one.dataset.ready === 'yes')")
    assert page.see("document.documentElement.scrollWidth") == width
    assert page.see(TOO_WIDE) == []
    captions = "[...document.querySelectorAll('caption span')].filter((one) => one.offsetParent)"
    assert page.see(f"{captions}.length") > 5
    assert page.see(f"{captions}.every((one) => one.getBoundingClientRect().right <= innerWidth)")
    background = page.see("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    assert page.troubles() == []


@pytest.mark.browser
def test_a_page_is_not_longer_than_a_few_screens(browser: Browser, linux: str) -> None:
    page = ready(browser, linux)
    assert page.see("document.documentElement.scrollHeight") < 4000
    rows = "[...document.querySelectorAll('#slowest tbody tr')].filter((row) => row.offsetHeight).length"
    assert page.see(rows) == 15
    page.click("#slowest-exits button.more")
    assert page.see(rows) == 32


@pytest.mark.browser
def test_print_shows_the_summary_with_all_columns(browser: Browser, linux: str) -> None:
    page = ready(browser, linux)
    assert page.pdf().count(b"/Type /Page\n") <= 3
    page.call("Emulation.setEmulatedMedia", media="print")
    page.resize(1032, 700)  # A4 landscape without its margins
    columns = "[...document.querySelectorAll('#exits thead th')].map((one) => one.getBoundingClientRect().right)"
    assert max(page.see(columns)) <= 1032
    assert page.see("document.getElementById('timeline-section').offsetHeight") == 0
    assert page.see("document.getElementById('verdict').offsetHeight") > 0


@pytest.mark.browser
def test_sorting_and_filtering(browser: Browser, tmp_path: Path, page: str) -> None:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    tab = ready(browser, file.as_uri())
    column = (
        "[...document.querySelectorAll('#{} tbody tr')].filter((r) => !r.hidden).map((r) => r.cells[{}].textContent)"
    )
    tab.click("#exits thead th:nth-child(3) button")
    counts = [int(text.replace(",", "")) for text in tab.see(column.format("exits", 2))]
    assert counts == sorted(counts, reverse=True)
    tab.see("document.getElementById('bring-up').open = true")
    tab.see("document.querySelector('input[data-filter=steps]').focus()")
    tab.write("KVM_CREATE")
    steps = tab.see(column.format("steps", 3))
    assert steps
    assert all("KVM_CREATE" in text for text in steps)
    assert tab.troubles() == []


@pytest.mark.browser
def test_any_moment_is_a_drag_away(browser: Browser, linux: str, report: Report) -> None:
    page = ready(browser, linux)
    whole = shown(page)
    assert whole[0] == 0
    left, top, width, _ = page.place("#timeline")
    page.drag(left + width * 0.45, top + 55, left + width * 0.6, top + 55)
    box = shown(page)
    assert box[1] - box[0] == pytest.approx(0.15 * (whole[1] - whole[0]), rel=0.05)
    page.mouse("mouseMoved", left + width / 2, top + 55)
    tip = page.see("document.getElementById('timeline-tip').textContent")
    assert re.search(r"VM-exit [\d]+, \w+, .* in all, rip 0x[0-9a-f]+; here: \w+ for .*, CPU \d+, from", tip)
    page.click("#timeline")
    page.mouse("mouseWheel", left + width / 2, top + 55, deltaX=0, deltaY=-120)
    assert shown(page)[1] - shown(page)[0] < box[1] - box[0]
    page.click("[data-zoom=all]")
    assert shown(page) == whole
    assert page.troubles() == []


@pytest.mark.browser
def test_what_is_searched_for_is_found(browser: Browser, linux: str) -> None:
    page = ready(browser, linux)
    assert ": VM-exit 508, io, out 0x518 (fw_cfg DMA), " in find(page, "0x518")
    first = said(page)
    assert find(page, "0x518") != first
    assert re.search(r": VM-exit 1712, ", find(page, "1712"))
    assert ", rsm, " in find(page, "rsm")
    assert "X2APIC_ICR" in find(page, "X2APIC_ICR")
    assert "rip 0xffffffff819f69b7" in find(page, "0xffffffff819f69b7")
    assert find(page, "nonsense") == "Nothing in this recording is called nonsense."


@pytest.mark.browser
def test_the_address_holds_the_view(browser: Browser, linux: str) -> None:
    page = ready(browser, linux)
    page.click("#slowest a")
    page.wait("document.getElementById('timeline-details').textContent.includes('VM-exit')")
    number = page.see("document.querySelector('#slowest a').textContent")
    assert f": VM-exit {number}, " in said(page)
    page.wait("/^#t=\\d+-\\d+,\\d+,\\d+$/.test(location.hash)")
    address = page.see("location.href")
    again = ready(browser, address)
    assert shown(again) == pytest.approx(shown(page), abs=2)
    assert said(again) == said(page)
    again.see("new Promise((done) => setTimeout(done, 400))")  # it writes what it shows into its own address
    assert again.see("location.hash").split(",")[-1] == address.split(",")[-1], "the cursor has moved"


@pytest.mark.browser
def test_keys_alone_are_enough(browser: Browser, linux: str) -> None:
    page = ready(browser, linux)
    page.key("Tab")
    assert page.see("document.activeElement.className") == "skip"
    for _ in range(400):
        page.key("Tab")
        if page.see("document.activeElement.id") == "timeline":
            break
    assert page.see("document.activeElement.id") == "timeline"
    page.key("+", "+")
    zoomed = shown(page)
    page.key("ArrowRight")
    assert shown(page)[0] > zoomed[0]
    page.key("ArrowDown")
    assert said(page).startswith("vCPU 1 ")
    before = said(page)
    page.key(".", ".")
    assert said(page) != before
    page.key("Home")
    assert shown(page)[0] == 0
    page.key("/", "/")
    assert page.see("document.activeElement.id") == "timeline-search"
    page.write("hlt")
    page.key("Enter")
    assert ", hlt, " in said(page)
    assert page.troubles() == []


@pytest.mark.browser
def test_all_charts_have_the_timelines_axis(browser: Browser, linux: str) -> None:
    page = ready(browser, linux)
    page.wait("[...document.querySelectorAll('#over-time figure')].every((one) => one.dataset.ready === 'yes')")
    left, top, width, _ = page.place("#over-time figure .u-over")
    page.drag(left + width * 0.4, top + 40, left + width * 0.6, top + 40)
    view = shown(page)
    assert view[1] - view[0] == pytest.approx(10.36e9 * 0.2, rel=0.05)
    charts = page.see("[...document.querySelectorAll('#over-time figure')].map((f) => [f.dataset.from, f.dataset.to])")
    for chart in charts:
        assert [float(end) for end in chart] == pytest.approx(view, abs=2)
    assert page.troubles() == []


@pytest.mark.browser
def test_charts_are_as_sharp_as_one_zooms(browser: Browser, linux: str) -> None:
    page = ready(browser, linux)
    page.wait("[...document.querySelectorAll('#over-time figure')].every((one) => one.dataset.ready === 'yes')")
    each = "[...document.querySelectorAll('#over-time figure')].map((f) => Number(f.dataset.each))"
    whole = page.see(each)
    page.see("kvmtrace.view(7.2e9, 7.3e9)")
    assert page.see(each) == [100e6 / 400] * 2
    assert all(before > 100e6 / 400 for before in whole)
    assert "a point for every 250 us" in page.see("document.getElementById('over-time').textContent")
    sampled = page.see("kvmtrace.sample(7.2e9, 7.3e9, 400)")
    events = open_recording(FIXTURES / "svm-6.12-linux-2vcpu.dat").events()
    since = {kind: events.ts_ns[events.rows(kind)] - events.ts_ns[0] for kind in ("kvm_exit", "kvm_userspace_exit")}
    wanted = {kind: int(((ts_ns >= 7.2e9) & (ts_ns < 7.3e9)).sum()) for kind, ts_ns in since.items()}
    assert round(sum(sampled["exits"]) * sampled["ns"] / 1e9) == wanted["kvm_exit"] > 50
    assert abs(round(sum(sampled["userspace"]) * sampled["ns"] / 1e9) - wanted["kvm_userspace_exit"]) <= 1
    page.see("kvmtrace.view(0, 1e12)")
    assert page.see(each) == whole
    assert page.troubles() == []


@pytest.mark.browser
def test_a_long_recording_is_drawn_in_bins_and_says_so(browser: Browser, long: str, linux: str) -> None:
    page = ready(browser, long)
    assert "is the finest that this page shows" in page.see("document.getElementById('timeline-section').textContent")
    left, top, width, _ = page.place("#timeline")
    page.mouse("mouseMoved", left + width * 0.55, top + 55)
    assert "in the 131.1 us around: " in page.see("document.getElementById('timeline-tip').textContent")
    assert "One of 55" in find(page, "0x518")
    found = {page.see("Number(document.getElementById('timeline').dataset.from)")}
    for _ in range(60):
        words = find(page, "0x518")
        found.add(page.see("Number(document.getElementById('timeline').dataset.from)"))
        assert "One of 55" in words
    assert len(found) > 20, "every place is reached, a stretch at a time"
    page.see("kvmtrace.view(7.2e9, 7.21e9)")
    assert "the sharpest that this page has" in page.see("document.getElementById('over-time').textContent")
    assert re.search(r": VM-exit 1715, io, out 0x518", find(page, "1715"))
    assert page.troubles() == []


@pytest.mark.browser
def test_names_from_a_trace_are_text(browser: Browser, report: Report, tmp_path: Path) -> None:
    assert report.timeline is not None
    vcpus = tuple(dataclasses.replace(vcpu, comm=HOSTILE) for vcpu in report.vcpus)
    lanes = tuple(dataclasses.replace(lane, label=HOSTILE) for lane in report.timeline.lanes)
    timeline = dataclasses.replace(report.timeline, lanes=lanes, reasons=(HOSTILE,) * len(report.timeline.reasons))
    capture = dataclasses.replace(report.capture, path=HOSTILE, host=HOSTILE, kernel=HOSTILE)
    hostile = dataclasses.replace(report, vcpus=vcpus, capture=capture, timeline=timeline)
    text = render_html(hostile)
    assert "<img src=x" not in text
    assert "\x1b" not in text
    file = tmp_path / "hostile.html"
    file.write_text(text, encoding="utf-8")
    page = ready(browser, file.as_uri())
    find(page, "1")
    page.see("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.see("new Promise((done) => setTimeout(done, 100))")
    assert page.see("document.title") != "owned"
    assert page.see("document.images.length") == 0
    assert page.troubles() == []


def test_a_report_without_anything_is_a_page(report: Report) -> None:
    empty = dataclasses.replace(
        report, exits=(), userspace_exits=(), vcpus=(), timeline=None, model=None, bring_up=None, rate=None, slowest=()
    )
    assert "</html>" in render_html(empty)
