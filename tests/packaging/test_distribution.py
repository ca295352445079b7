"""What is shipped: nothing that git does not know, but the compiled module and manual pages; it needs no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRACERS = "kvmtrace/_tracers/"
MODULE = "kvmtrace/_native/_loops.abi3.so"
FIXTURE = ROOT / "fixtures" / "svm-6.1-lifecycle.dat"
NOT_INSTALLED = {"kvmtrace/ARCHITECTURE.md", "kvmtrace/_native/build_hook.py", "kvmtrace/_native/compiling.py"}
SHIPPED = ("kvmtrace", "tracers", "docs/systemd", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml")
UNITS = "lib/systemd/system/"  # below sys.prefix
MAN = "share/man/man1/"
NO_COMPILER = {"PATH": "/nonexistent", "CC": "no-such-compiler"}


def tracked(*under: str) -> set[str]:
    out = subprocess.run(["git", "ls-files", "-z", *under], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in out.split("\0") if name and (ROOT / name).is_file()}


def run(*argv: str | Path, **options) -> str:
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{' '.join(map(str, argv))}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Build both from a copy of what git knows, and of what lies about in a working tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    for stray in ("kvmtrace/_native/old.so", "kvmtrace/check/__pycache__/x.pyc", "tracers/x.o", ".venv/bin/python"):
        (copy / stray).parent.mkdir(parents=True, exist_ok=True)
        (copy / stray).write_bytes(b"stray")
    run(sys.executable, "-m", "hatchling", "build", "-d", copy / "dist", cwd=copy)
    return copy / "dist"


def test_the_source_distribution_is_what_git_knows(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    wanted = tracked(*SHIPPED, ".gitignore")
    assert names == wanted | {"PKG-INFO"}


def test_the_wheel_is_what_git_knows_and_the_compiled_module(dist, tmp_path):
    (path,) = dist.glob("*.whl")
    assert "-cp311-abi3-linux_" in path.name
    with zipfile.ZipFile(path) as archive:
        all_names = archive.namelist()
        names = {name for name in all_names if ".dist-info/" not in name and ".data/" not in name}
        data = {name.partition(".data/data/")[2]: archive.read(name) for name in all_names if ".data/" in name}
        module = archive.read(MODULE)
    wanted = {name for name in tracked("kvmtrace") if name not in NOT_INSTALLED and not name.endswith((".c", ".h"))}
    wanted |= {name.replace("tracers/", TRACERS, 1) for name in tracked("tracers")}
    assert names == wanted | {MODULE}
    assert {name for name in data if not name.startswith(MAN)} == {
        name.replace("docs/systemd/", UNITS, 1) for name in tracked("docs/systemd")
    }
    run(sys.executable, "-m", "kvmtrace.cli.man_pages", tmp_path / "man")
    pages = {MAN + page.name: page.read_bytes() for page in (tmp_path / "man").iterdir()}
    assert {name: text for name, text in data.items() if name.startswith(MAN)} == pages
    assert module.startswith(b"\x7fELF")


def test_the_module_needs_nothing_but_python_and_the_c_library(dist, tmp_path):
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        module = archive.extract(MODULE, tmp_path)
    needed = [line.split()[-1] for line in run("objdump", "-p", module).splitlines() if "NEEDED" in line]
    assert needed == ["libc.so.6"]
    exported = [line.split() for line in run("nm", "-D", "--defined-only", module).splitlines()]
    assert [words[-1] for words in exported if words[-2] == "T"] == ["PyInit__loops"]


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_environment_without_a_compiler(dist, tmp_path):
    """Its dependencies come from the package index, as wheels; nothing of this checkout is in reach."""
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | NO_COMPILER
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--only-binary", ":all:"]
    run(*pip, "-c", ROOT / ".ci" / "constraints.txt", wheel, env=environment, cwd=tmp_path)
    kvmtrace = tmp_path / "venv" / "bin" / "kvmtrace"
    shutil.copy(FIXTURE, tmp_path / "some.dat")

    def ours(*arguments: str) -> str:
        return run(kvmtrace, *arguments, env=environment, cwd=tmp_path)

    assert "kvmtrace report: some.dat" in ours("report", "some.dat")
    assert "conforms" in ours("check", "some.dat")
    ours("report", "--format", "html", "some.dat", "-o", "some.html")
    ours("export", "some.dat", "-o", "some.parquet")
    assert "conforms" in ours("check", "some.parquet")
    assert "records" in ours("doctor")
    for unit in (ROOT / "docs" / "systemd").iterdir():
        assert (tmp_path / "venv" / UNITS / unit.name).read_text() == unit.read_text()
    assert ".TH KVMTRACE-WATCH 1" in (tmp_path / "venv" / MAN / "kvmtrace-watch.1").read_text()
    where = run(python, "-c", "import kvmtrace; print(kvmtrace.__file__)", env=environment, cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(dist, tmp_path):
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    (tree,) = (path for path in tmp_path.iterdir() if path.is_dir())
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", cwd=tree)
    (again,) = (tmp_path / "dist").glob("*.whl")
    assert again.name == wheel.name
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


@pytest.mark.slow
def test_without_a_compiler_it_does_not_build_and_says_what_to_install(tmp_path):
    for name in tracked(*SHIPPED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    environment = os.environ | {"CC": "no-such-compiler"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "apt install gcc libc6-dev python3-dev" in done.stdout + done.stderr
    assert not list((tmp_path / "dist").glob("*.whl"))
