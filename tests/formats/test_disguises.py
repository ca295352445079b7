"""The same recording as text in every disguise that mail, editors and web pages put on it: the same verdict."""

from __future__ import annotations

import html
import quopri
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording

FIXTURES = Path(__file__).parents[2] / "fixtures"
NAMES = ("vmx-6.1-lifecycle", "svm-6.1-smp", "svm-6.12-string-io")


def trace_cmd(name: str, *options: str) -> str:
    command = ["trace-cmd", "report", *options, "-i", str(FIXTURES / f"{name}.dat")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def excerpt(text: str) -> str:
    return text.split("\n", 1)[1]  # without cpus=N


def each(text: str, change) -> str:
    return "".join(f"{change(i, line)}\n" for i, line in enumerate(text.splitlines(), 1))


def wrap(width: int):
    def wrapped(_, line: str) -> str:
        parts = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False, drop_whitespace=True)
        return "\n".join(parts)

    return lambda text: each(text, wrapped)


def quoted_printable(text: str) -> str:
    mail = f"Subject: it hangs\nContent-Transfer-Encoding: quoted-printable\n\n{text}"
    return quopri.encodestring(mail.encode()).decode()


def coloured(text: str) -> str:
    """As grep --color and ccze leave it."""
    return re.sub(r"\b(kvm_\w+|reason)\b", "\x1b[01;31m\x1b[K\\1\x1b[m\x1b[K", text)


DISGUISES = {
    "each line twice": lambda text: each(text, lambda _, line: f"{line}\n{line}"),
    "each line twice, quoted": lambda text: each(text, lambda _, line: f"> {line}\r\n> {line}\r"),
    "excerpt": excerpt,
    "crlf": lambda text: text.replace("\n", "\r\n"),
    "crcrlf": lambda text: excerpt(text).replace("\n", "\r\r\n"),
    "bom": lambda text: "\ufeff" + text,
    "quoted": lambda text: each(excerpt(text), lambda _, line: f"> {line}"),
    "quoted twice": lambda text: each(excerpt(text), lambda _, line: f">> {line}"),
    "quoted, spaced": lambda text: each(excerpt(text), lambda _, line: f" > > {line}"),
    "fenced": lambda text: f"```\n{text}```\n",
    "fenced in words": lambda text: f"Hello,\nhere is my trace:\n\n```text\n{excerpt(text)}```\nThanks\n",
    "jira": lambda text: f"{{noformat}}\n{text}{{noformat}}\n",
    "cat -n": lambda text: each(excerpt(text), lambda i, line: f"{i:6}\t{line}"),
    "grep -n": lambda text: each(excerpt(text), lambda i, line: f"{i}:{line}"),
    "numbered": lambda text: each(text, lambda i, line: f"{i:4} | {line}"),
    "quoted numbers": lambda text: each(excerpt(text), lambda i, line: f"> {i}: {line}"),
    "tabs": lambda text: "\n".join(line.replace("  ", "\t") for line in text.split("\n")),
    "stripped": lambda text: each(text, lambda _, line: line.strip()),
    "squeezed": lambda text: each(text, lambda _, line: " ".join(line.split())),
    "padded": lambda text: each(text, lambda _, line: f"{line}    "),
    "nbsp": lambda text: text.replace("  ", " \xa0"),
    "indented": lambda text: textwrap.indent(text, "    "),
    "html": lambda text: f"<pre>\n{html.escape(text)}</pre>\n",
    "empty lines": lambda text: text.replace("\n", "\n\n"),
    "wrapped at 72": wrap(72),
    "wrapped at 78, quoted": lambda text: each(wrap(78)(excerpt(text)), lambda _, line: f"> {line}"),
}

# seen on one recording
OF_LOGS_AND_MAILS = {
    "quoted-printable": lambda text: quoted_printable(excerpt(text)),
    "quoted-printable, a reply": lambda text: quoted_printable(each(excerpt(text), lambda _, line: f"> {line}")),
    "quoted-printable without a header": lambda text: quopri.encodestring(excerpt(text).encode()).decode(),
    "quoted-printable, wrapped at 72": lambda text: quoted_printable(wrap(72)(excerpt(text))),
    "coloured": coloured,
    "journal": lambda text: each(excerpt(text), lambda _, line: f"Nov 27 19:58:34 host-1 trace.sh[991]: {line}"),
    "journal, ISO": lambda text: each(excerpt(text), lambda _, line: f"2026-11-27T19:58:34+0100 host k: {line}"),
    "dates": lambda text: each(excerpt(text), lambda _, line: f"2026-11-27 19:58:34.123456 {line}"),
    "kernel log": lambda text: each(excerpt(text), lambda i, line: f"[ {i // 9:4}.{i % 9:06}] {line}"),
    "remarks of grep": lambda text: each(excerpt(text), lambda _, line: f"t.txt:{line}"),
}


def verdict(path: Path) -> tuple:
    found = check_recording(open_recording(path))
    counts = {rule: (t.checked, t.held, t.violated, t.unknown) for rule, t in found.rules.items()}
    return counts, found.n_events, found.explained_events, [(v.rule, v.event_index) for v in found.violations]


@pytest.fixture(scope="module", params=NAMES)
def clean(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("clean") / "trace.txt"
    text = trace_cmd(request.param)
    path.write_text(text)
    found = verdict(path)
    assert not found[3]
    return request.param, text, found


@pytest.mark.parametrize("name", DISGUISES)
def test_the_verdict_is_that_of_the_clean_text(clean, name, tmp_path):
    path = tmp_path / "trace.txt"
    path.write_bytes(DISGUISES[name](clean[1]).encode())
    assert verdict(path) == clean[2]


@pytest.mark.parametrize("name", OF_LOGS_AND_MAILS)
def test_logs_and_the_source_of_mails(tmp_path, name):
    text = trace_cmd(NAMES[-1]).split("\n")
    path = tmp_path / "trace.txt"
    path.write_text("\n".join(text[:2000]))
    clean = verdict(path)
    path.write_text(OF_LOGS_AND_MAILS[name]("\n".join(text[:2000])))
    assert verdict(path) == clean


def test_windows_shells_write_utf_16(clean, tmp_path):
    path = tmp_path / "trace.txt"
    path.write_bytes(clean[1].replace("\n", "\r\n").encode("utf-16"))
    assert verdict(path) == clean[2]


@pytest.mark.parametrize("options", [("--ts-diff",), ("-t",), ("-l",)], ids=" ".join)
def test_options_of_trace_cmd_report(clean, options, tmp_path):
    """No rule compares times, so that nanoseconds (-t) change nothing; -l has flags, which more rules look at."""
    path = tmp_path / "trace.txt"
    path.write_text(trace_cmd(clean[0], *options))
    found = verdict(path)
    if options != ("-l",):
        assert found == clean[2]
    assert found[1:] == clean[2][1:]


def test_a_disguise_is_no_damage(clean, tmp_path):
    path = tmp_path / "trace.txt"
    path.write_bytes(DISGUISES["quoted numbers"](clean[1]).replace("\n", "\r\n").encode())
    recording = open_recording(path)
    recording.events()
    assert not recording.loss.damage


def test_damage_is_located_in_the_file_as_it_stands(tmp_path):
    line = b"> 1: vcpu0-7 [000] 1.000001: kvm_fpu: load\r\n"
    path = tmp_path / "trace.txt"
    path.write_bytes(b"\xef\xbb\xbf" + line + line + b"> !! what is this\r\n" + line)
    recording = open_recording(path)
    recording.events()
    assert [(d.offset, d.found) for d in recording.loss.damage] == [(3 + 2 * len(line), "'!! what is this'")]


@pytest.mark.parametrize("max_events", [1, 2, 7, 1000])
def test_lines_that_stand_there_twice_are_one_event_in_pieces_too(tmp_path, max_events):
    clean, doubled = tmp_path / "clean", tmp_path / "doubled"
    text = trace_cmd("svm-6.1-smp")
    clean.write_text(text)
    doubled.write_text(each(text, lambda _, line: f"{line}\n{line}"))
    want = len(open_recording(clean).events())
    recording = open_recording(doubled)
    assert sum(map(len, recording.iter_events(max_events))) == want
    assert recording.loss.repeated == want


def test_some_equal_lines_are_as_many_events(tmp_path):
    """Two interrupts within a microsecond look alike."""
    path = tmp_path / "trace"
    lines = trace_cmd("svm-6.1-smp").splitlines()
    doubled = [again for i, line in enumerate(lines) for again in [line] * (1 + i % 2)]
    path.write_text("\n".join([*doubled, ""]))
    recording = open_recording(path)
    assert len(recording.events()) > len(lines)
    assert recording.loss.repeated == 0
