"""The known formats: content decides, a new format is a folder and a line, no source is read without an end."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import kvmtrace
from kvmtrace.errors import FormatError, UsageError
from kvmtrace.formats import open_recording, source
from kvmtrace.formats.known_formats import FORMATS, known_formats

ROOT = Path(kvmtrace.__file__).parent
FIXTURE = ROOT.parent / "fixtures" / "svm-6.1-smp.dat"

TOY = '''"""A toy: a folder with one file of events, `seconds event: text` each."""

from kvmtrace.formats.known_formats import Format


def _sniff(source):
    from pathlib import Path

    return source.is_folder and (Path(source.path) / "toy.events").is_file()


def _open(source):
    from pathlib import Path

    from kvmtrace.formats.ftrace_text.text_recording import TextRecording

    lines = (Path(source.path) / "toy.events").read_text().splitlines()
    text = "".join(f" vcpu-7 [000] d..1. {line}\\n" for line in lines)
    return TextRecording(memoryview(text.encode()), source.path, "toy")


FORMAT = Format("a toy", _sniff, _open)
'''
EVENTS = (
    "1.000001: kvm_entry: vcpu 0, rip 0x1000\n"
    "1.000004: kvm_exit: vcpu 0 reason CPUID rip 0x1000 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0\n"
    "1.000009: kvm_entry: vcpu 0, rip 0x1002\n"
)


def test_a_new_format_is_a_folder_and_a_line(tmp_path):
    copy = tmp_path / "kvmtrace"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "formats" / "toy").mkdir()
    (copy / "formats" / "toy" / "__init__.py").write_text(TOY)
    formats = copy / "formats" / "known_formats.py"
    formats.write_text(formats.read_text().replace('    "arrow",\n', '    "arrow",\n    "toy",\n'))
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    (recorded / "toy.events").write_text(EVENTS)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command, said in (("check", "conforms"), ("report", "CPUID")):
        run = [sys.executable, "-m", "kvmtrace", command, str(recorded)]
        done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stdout) == (0, True), done.stdout + done.stderr


def test_every_format_is_listed_with_what_it_needs():
    folders = {path.parent.name for path in (ROOT / "formats").glob("*/__init__.py")}
    assert set(FORMATS) == folders - {"common", "summary"}
    assert all(known.title for known in known_formats())


def test_looking_for_the_format_imports_no_decoder():
    code = "import sys; from kvmtrace.formats import known_formats as f; list(f.known_formats()); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "pyarrow", "zstandard"} & set(done.stdout.split())


def test_a_folder_that_is_no_recording(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        open_recording(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"\x1f\x8b\x08\0\0", "compressed by gzip; unpack it first"),
        (b"\0\1\2\3", "00 01 02 03"),
        (b"hello\nworld\n", "text without a line of a trace, beginning with 'hello'"),
        (b"[    1.234567] kvm: nested virtualisation\n", "kernel log"),
        (b"<html><body>x</body></html>\n", "HTML"),
        ("Grüße aus dem Gast\n".encode(), "text without a line"),
        (b" 990.000001: kvm_entry: vcpu 0, rip 0x1000\n", "lines of events without task and CPU"),
    ],
)
def test_what_no_format_reads_is_named(tmp_path, content, found):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        open_recording(path)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def pipe_of(data: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write():
        with contextlib.suppress(BrokenPipeError), path.open("wb") as pipe:
            for at in range(0, len(data), 1000):
                pipe.write(data[at : at + 1000])

    threading.Thread(target=write, daemon=True).start()
    return path


@pytest.mark.parametrize("limit", [source.READ_LIMIT, 50_000])
def test_a_pipe_is_read_as_the_file(tmp_path, monkeypatch, limit):
    """In memory, or through a file where it is larger than that."""
    monkeypatch.setattr(source, "READ_LIMIT", limit)
    piped = open_recording(pipe_of(FIXTURE.read_bytes(), tmp_path)).events()
    assert piped.ts_ns.tolist() == open_recording(FIXTURE).events().ts_ns.tolist()


def test_a_pipe_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "READ_LIMIT", 10_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100_000})())
    text = b" vcpu-7 [000] d..1. 1.5: kvm_fpu: load\n" * 4000
    with pytest.raises(UsageError, match="does not end within"):
        open_recording(pipe_of(text, tmp_path))


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom"])
def test_a_device_without_end_is_looked_at_first(device):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    run = [sys.executable, "-m", "kvmtrace", "check", device]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300, preexec_fn=limit)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
