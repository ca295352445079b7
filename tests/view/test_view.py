"""`kvmtrace view`: who may read, what a stretch holds, what is found, and that it ends."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import pytest
from chromium import Browser

import kvmtrace.report.timeline
from kvmtrace.formats import open_recording
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.view.finding import matching
from kvmtrace.view.live_report import serve_report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.view.server import ViewServer

LINUX = Path(__file__).parents[2] / "fixtures" / "svm-6.12-linux-2vcpu.dat"


@pytest.fixture(scope="module")
def server() -> Iterator[ViewServer]:
    """Serve a recording that is taken for a long one."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvmtrace.report.timeline, "MAX_SEGMENTS", 1000)
        report = build_report(open_recording(LINUX), ReportOptions(timeline=True, model=False, stretches=kept.append))
    with serve_report(report, kept[0]) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: ViewServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=300)
    try:
        link.request(method, path, headers=headers)
        answer = link.getresponse()
        return answer.status, answer.read(), dict(answer.headers)
    finally:
        link.close()


def stretch(server: ViewServer, begin: int, end: int, bins: int = 1000) -> dict:
    status, body, _ = ask(server, f"{server.path}stretch?from={begin}&to={end}&bins={bins}")
    assert status == 200
    data = zlib.decompress(body)
    size = int.from_bytes(data[:4], "little")
    return json.loads(data[4 : 4 + size])


def found(server: ViewServer, words: str, after: int = -1) -> dict:
    status, body, _ = ask(server, f"{server.path}find?words={quote(words)}&after={after}")
    assert status == 200
    return json.loads(body)


def test_it_listens_on_the_loopback_address_alone(server: ViewServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_the_page_is_for_who_has_the_token(server: ViewServer) -> None:
    status, body, headers = ask(server, server.path)
    assert status == 200
    assert b"data-live=" in body
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    for path in (
        "/",
        "/" + "x" * 32 + "/",
        server.path + "..",
        server.path + "../etc/passwd",
        "//",
        server.path[:-1] + "x/",
    ):
        assert ask(server, path)[0] == 404, path
    assert server.token.encode() not in ask(server, "/")[1]


def test_a_foreign_host_is_refused(server: ViewServer) -> None:
    for host in ("evil.example", f"evil.example:{server.server_port}", "", "127.0.0.1", "127.0.0.1:1"):
        assert ask(server, server.path, Host=host)[0] == 403, host
    assert ask(server, server.path, Host=f"localhost:{server.server_port}")[0] == 200


def test_nothing_but_reading(server: ViewServer) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(server, server.path, method)[0] == 501
    status, body, _ = ask(server, server.path, "HEAD")
    assert (status, body) == (200, b"")


@pytest.mark.parametrize(
    "query", ["", "from=1", "from=a&to=b&bins=c", "from=1&to=2&bins=", "from=\u0661&to=2&bins=3", "from=" + "9" * 30]
)
def test_what_is_no_stretch_is_refused(server: ViewServer, query: str) -> None:
    status, body, _ = ask(server, f"{server.path}stretch?{quote(query, safe='=&')}")
    assert status == 400
    assert b"Traceback" not in body


def test_numbers_out_of_bounds_are_held_inside(server: ViewServer) -> None:
    assert stretch(server, 0, 10**18, 10**9)
    assert stretch(server, 10**18, 5)


def test_a_short_stretch_is_segments_of_all_vcpus(server: ViewServer) -> None:
    data = stretch(server, 5_000_000_000, 5_100_000_000)
    assert {window["lane"] for window in data["windows"]} == {0, 1}
    assert data["bins"] == []
    begin = min(window["start"] for window in data["windows"] if window["lane"] == 0)
    assert begin <= 5_000_000_000
    assert all(window["first"] for window in data["windows"] if window["exits"])


def test_the_next_one_is_found(server: ViewServer) -> None:
    first = found(server, "0x518")
    second = found(server, "0x518", first["at"] + 1)
    assert first["begin"] <= first["at"] < second["at"]
    last, seen = first, 1
    while (following := found(server, "0x518", last["at"] + 1))["at"] > last["at"]:
        last, seen = following, seen + 1
    assert seen == 55  # as `report --by port` counts, and then from the start again
    assert following["at"] == first["at"]


def test_exits_are_found_by_number_reason_and_rip(server: ViewServer) -> None:
    slow = found(server, "1715")
    assert slow["lane"] == 0
    assert slow["dur"] > 200_000_000
    assert found(server, "rsm")["lane"] == 0
    assert found(server, "X2APIC_ICR")["dur"] > 0
    assert found(server, "0xffffffff819f69b7")["dur"] > 0
    assert found(server, "nonsense") is None
    assert found(server, "99999999") is None


def test_a_number_in_hexadecimal_is_meant_as_a_whole() -> None:
    names = ["out 0x3f8 (COM1)", "out 0x3f80", "read 0x3f8000"]
    assert matching("0x3F8", names).tolist() == [True, False, False]
    assert matching("0x3f", names).tolist() == [True, True, True]
    assert matching("com", names).tolist() == [True, False, False]


def test_ctrl_c_ends_it() -> None:
    viewer = subprocess.Popen(
        [sys.executable, "-m", "kvmtrace", "view", "--no-model", str(LINUX)], stdout=subprocess.PIPE, text=True
    )
    assert viewer.stdout is not None
    line = viewer.stdout.readline()
    assert line.startswith("http://127.0.0.1:")
    assert len(urlsplit(line.split()[0]).path) > 30
    viewer.send_signal(signal.SIGINT)
    assert viewer.wait(120) == 0
    viewer.stdout.close()


@pytest.mark.browser
def test_the_browser_gets_what_the_page_does_not_hold(server: ViewServer, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        page = browser.open(server.url)
        page.wait("document.getElementById('timeline').dataset.ready === 'yes'")
        left, top, width, _ = page.place("#timeline")
        for _ in range(3):
            page.drag(left + width * 0.5, top + 55, left + width * 0.55, top + 55)
        page.wait("document.getElementById('timeline').dataset.sharp === 'yes'")
        page.mouse("mouseMoved", left + width / 2, top + 55)
        assert "around" not in page.see("document.getElementById('timeline-tip').textContent")
        page.see("document.getElementById('timeline-search').value = '0xffffffff819f69b7'")
        page.click("#timeline-next")
        page.wait("document.getElementById('timeline-details').textContent.includes('rip 0xffffffff819f69b7')")
        assert page.troubles() == []
