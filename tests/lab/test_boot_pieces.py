"""What a lab host boots from: initramfs archives, repacked kernels, modules, jobs."""

from __future__ import annotations

import lzma
import os
import struct
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from iced_x86 import Code, Decoder, FlowControl, Formatter, FormatterSyntax

from kvmtrace.errors import CapabilityError, UsageError
from kvmtrace.lab import kernels, repack
from kvmtrace.lab.cache import cache_dir, cached, digest
from kvmtrace.lab.cpio import CpioArchive
from kvmtrace.lab.image import CYLINDER_BYTES, pad_to_cylinder
from kvmtrace.lab.job import Job, write_job
from kvmtrace.lab.kernels import Kernel, get_kernel, read_module
from kvmtrace.lab.lab_run import run_lab

if TYPE_CHECKING:
    from pathlib import Path


def test_cpio_reads_the_archive(tmp_path: Path):
    archive = CpioArchive()
    archive.add_file("a/b/text", b"hello", 0o755)
    archive.add_symlink("a/link", "b/text")
    archive.add_directory("a")
    data = archive.to_bytes()
    listing = subprocess.run(["cpio", "-it", "--quiet"], input=data, capture_output=True, check=True).stdout.decode()
    assert listing.split() == ["a", "a/b", "a/b/text", "a/link"]
    subprocess.run(["cpio", "-id", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "a" / "link").read_bytes() == b"hello"
    assert (tmp_path / "a/b/text").stat().st_mode & 0o777 == 0o755


def make_bzimage(elf: bytes) -> bytes:
    payload = lzma.compress(elf, check=lzma.CHECK_CRC32) + struct.pack("<I", len(elf))
    image = bytearray(1024)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<II", image, 0x248, 64, len(payload))
    return bytes(image) + bytes(64) + payload


def make_elf(segments: list[tuple[int, bytes]], entry: int) -> bytes:
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, len(segments), 0, 0, 0
    )
    table, body, offset = b"", b"", 64 + 56 * len(segments)
    for paddr, data in segments:
        table += struct.pack("<IIQQQQQQ", 1, 5, offset + len(body), paddr, paddr, len(data), len(data), 4096)
        body += data
    return header + table + body


def test_repacked_kernel_lies_at_its_place():
    elf = make_elf([(0x1000000, b"text" * 100), (0x1002000, b"data" * 7)], 0x1000010)
    image = repack.repack_kernel(make_bzimage(elf))
    body = image[1024 + repack.STUB_BYTES :]
    assert body[:400] == b"text" * 100
    assert body[0x2000:0x201C] == b"data" * 7
    assert struct.unpack_from("<I", image, 0x1F4)[0] * 16 == len(image) - 1024
    assert struct.unpack_from("<H", image, 0x206)[0] == 0x209


def test_the_stub_is_the_code_its_comments_say():
    stub = repack._stub(0x1000000, 0x1000123, 0x4000)
    decoder = Decoder(32, stub, ip=repack.LOAD_ADDRESS)
    formatter = Formatter(FormatterSyntax.INTEL)
    code32, starts = [], set()
    for instruction in decoder:
        code32.append(formatter.format(instruction))
        starts.add(instruction.ip)
        if instruction.flow_control == FlowControl.CONDITIONAL_BRANCH:
            assert instruction.near_branch_target in starts
        if instruction.code == Code.JMP_PTR1632:
            target, selector = instruction.far_branch32, instruction.far_branch_selector
            break
    assert (selector, target) == (0x10, repack.LOAD_ADDRESS + decoder.position)
    assert {"std", "mov cr3,eax", "mov cr0,eax", "wrmsr"} <= set(code32)
    code64 = [formatter.format(i) for i in Decoder(64, stub[decoder.position : 0x100].rstrip(b"\0"), ip=target)]
    assert code64 == [
        "mov eax,18h",
        "mov ds,ax",
        "mov es,ax",
        "mov ss,ax",
        "mov fs,ax",
        "mov gs,ax",
        "mov esi,ebp",
        "mov eax,1000123h",
        "jmp rax",
    ]


@pytest.mark.parametrize("image", [b"", b"x" * 5000, make_bzimage(b"no ELF")])
def test_other_files_are_no_kernel(image: bytes):
    with pytest.raises(CapabilityError):
        repack.repack_kernel(image)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    modules = tmp_path / "lib" / "modules" / "6.9.0"
    modules.mkdir(parents=True)
    (modules / "modules.dep").write_text(
        "kernel/kvm/kvm-amd.ko: kernel/kvm/kvm.ko kernel/irqbypass.ko\n"
        "kernel/kvm/kvm.ko: kernel/irqbypass.ko\nkernel/irqbypass.ko:\n"
    )
    (modules / "modules.builtin").write_text("kernel/drivers/virtio_pci.ko\n")
    return Kernel("6.9", "6.9.0", tmp_path)


def test_modules_load_after_what_they_need(kernel: Kernel):
    names = [path.name for path in kernel.load_order(("virtio_pci", "kvm_amd"))]
    assert names == ["irqbypass.ko", "kvm.ko", "kvm-amd.ko"]
    with pytest.raises(CapabilityError, match="no module kvm_intel"):
        kernel.load_order(("kvm_intel",))


@pytest.mark.parametrize("suffix", [".ko", ".ko.xz"])
def test_a_modules_signature_is_cut_off(tmp_path: Path, suffix: str):
    signature = b"S" * 300
    tail = signature + struct.pack(">8xI", len(signature)) + kernels.SIGNATURE_MAGIC
    data = b"\x7fELF module" + tail
    path = tmp_path / f"m{suffix}"
    path.write_bytes(lzma.compress(data) if suffix.endswith("xz") else data)
    assert read_module(path) == b"\x7fELF module"


def test_the_newest_kernel_is_chosen_by_number(monkeypatch):
    releases = ("9-amd64", "56-amd64", "56-rt-amd64", "57-cloud-amd64")
    names = "\n".join(f"linux-image-6.1.0-{release}" for release in releases)
    monkeypatch.setattr(kernels, "run_tool", lambda command: names)
    assert kernels._newest_release("6.1") == "6.1.0-56-amd64"
    with pytest.raises(CapabilityError, match="apt-get update"):
        kernels._newest_release("6.12")
    with pytest.raises(UsageError):
        get_kernel("2.4")


def test_cache_builds_once_and_forgets_failures(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("KVMTRACE_LAB_CACHE", str(tmp_path / "cache"))

    def fail(work: Path) -> None:
        (work / "half").touch()
        raise CapabilityError("no")

    with pytest.raises(CapabilityError):
        cached("item", fail)
    assert not (tmp_path / "cache" / "item").exists()
    built: list[Path] = []
    for _ in range(2):
        assert cached("item", built.append).is_dir()
    assert len(built) == 1
    old = tmp_path / "cache" / "item-1"
    for age_s, kept in ((3600, True), (30 * 24 * 3600, False)):
        old.mkdir(exist_ok=True)
        os.utime(old, (time.time() - age_s,) * 2)
        cached(f"item-{age_s}", built.append)
        assert old.exists() == kept
    assert digest(["ab", "c"]) != digest(["a", "bc"])


def test_disks_are_whole_cylinders(tmp_path: Path):
    path = tmp_path / "disk"
    for size in (0, 1, CYLINDER_BYTES, CYLINDER_BYTES + 1):
        path.write_bytes(b"x" * size)
        pad_to_cylinder(path)
        assert path.stat().st_size % CYLINDER_BYTES == 0
        assert path.stat().st_size >= max(size, CYLINDER_BYTES)


def test_job_quotes_its_command_and_copies_modules(tmp_path: Path):
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "kvm.ko").write_bytes(b"faulty")
    cwd = tmp_path / "a b'c"
    cwd.mkdir()
    job = Job("svm", ("printf", "%s|", "two words", "$HOME", "'"), cwd=cwd, module_dir=modules)
    write_job(job, tmp_path / "job")
    script = tmp_path / "job" / "lower" / ".kvmtrace-lab" / "command"
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "two words|$HOME|'|"
    assert (tmp_path / "job" / "modules" / "kvm.ko").read_bytes() == b"faulty"
    with pytest.raises(UsageError, match=r"no \.ko"):
        write_job(Job("svm", ("true",), module_dir=cwd), tmp_path / "job2")


@pytest.mark.parametrize(
    "job",
    [
        Job("arm", ("true",)),
        Job("svm", ()),
        Job("vmx", ("true",), cpus=2),
        Job("vmx", ("true",), memory_mib=3072),
    ],
    ids=["no ISA", "no command", "CPUs", "memory"],
)
def test_senseless_jobs_are_refused(job: Job):
    with pytest.raises(UsageError):
        run_lab(job)


@pytest.mark.parametrize("variable", ["KVMTRACE_LAB_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_made_but_no_folders_above_it(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, a home that no user has (/nonexistent) would be made, too."""
    for name in ("KVMTRACE_LAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    below = tmp_path if variable == "HOME" else tmp_path / "cache"
    monkeypatch.setenv(variable, str(below))
    assert cache_dir().is_dir()
    assert cache_dir().is_relative_to(below)
    monkeypatch.setenv(variable, str(tmp_path / "no" / "such"))
    with pytest.raises(CapabilityError, match="no such directory"):
        cache_dir()
    assert not (tmp_path / "no").exists()
