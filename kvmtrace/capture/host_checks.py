"""What this host has of what a recording needs or can use; each check changes nothing and knows its remedy."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib.util import find_spec
from pathlib import Path

from kvmtrace.capture.capabilities import capabilities, missing_for_bpf
from kvmtrace.capture.host import kvm_modules
from kvmtrace.capture.tracefs import KNOWN_FORMAT, MOUNT_POINT, lockdown_mode, may
from kvmtrace.isa.probes import PROBES
from kvmtrace.kvm.tracepoints import LIFECYCLE, MINIMAL
from kvmtrace.lazy_dataclass import dataclass

OK, MISSING, OPTIONAL = "ok", "missing", "optional"  # optional: missing, and recording works without
KVM_GET_API_VERSION = 0xAE00  # _IO(KVMIO, 0x00), include/uapi/linux/kvm.h
KVM_API_VERSION = 12
DEVICE = Path("/dev/kvm")


@dataclass(frozen=True)
class Check:
    """One thing a recording needs or can use.

    Parameters
    ----------
    name : str
    state : "ok" "missing" "optional"
    found : str, what is there
    remedy : str, how to get it; "" if nothing is to be done
    """

    name: str
    state: str
    found: str
    remedy: str = ""


def check_kvm_device() -> Check:
    """/dev/kvm: needed to run a guest, not to record one that others run."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Check(
            "/dev/kvm",
            OPTIONAL,
            "not there",
            "load KVM: modprobe kvm_intel or kvm_amd (arm64 has it built in); without VMX, SVM or EL2, "
            "`kvmtrace lab run` brings an emulated host",
        )
    except OSError as error:
        return Check(
            "/dev/kvm",
            OPTIONAL,
            error.strerror or "cannot be opened",
            "add yourself to the group kvm, or use sudo; recording other VMs works without it",
        )
    try:
        version = ctypes.CDLL(None).ioctl(fd, KVM_GET_API_VERSION, 0)
    finally:
        os.close(fd)
    found = f"API version {version}"
    return Check("/dev/kvm", OK if version == KVM_API_VERSION else OPTIONAL, found)


def _check_arm64() -> Check:
    """KVM/arm64 is built in, and there is /dev/kvm where the kernel was started at EL2."""
    if DEVICE.exists():
        return Check("virtualization", OK, "EL2, KVM is built in")
    remedy = "the firmware or boot loader must start the kernel at EL2; or use `kvmtrace lab run --isa arm64`"
    return Check("virtualization", OPTIONAL, "no KVM at EL2", remedy)


def check_hardware() -> Check:
    """VMX or SVM, and the KVM modules; arm64's EL2."""
    if platform.machine() == "aarch64":
        return _check_arm64()
    text = _read(Path("/proc/cpuinfo"))
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    isa = "VMX" if "vmx" in flags else "SVM" if "svm" in flags else None
    modules = ", ".join(kvm_modules()) or "no KVM module"
    if isa:
        return Check("virtualization", OK, f"{isa}, {modules}")
    return Check(
        "virtualization",
        OPTIONAL,
        f"neither VMX nor SVM, {modules}",
        "switch it on in the firmware, or use `kvmtrace lab run`",
    )


def check_privileges() -> Check:
    """Who we are and which capabilities we have."""
    held = capabilities()
    names = ", ".join(sorted(held)) or "none of CAP_SYS_ADMIN, CAP_BPF, CAP_PERFMON"
    user = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    enough = not missing_for_bpf()
    return Check(
        "privileges",
        OK if enough else MISSING,
        f"{user}, {names}",
        "" if enough else "use sudo, or grant CAP_BPF and CAP_PERFMON and access to tracefs",
    )


def check_lockdown() -> Check:
    """Kernel lockdown: integrity is harmless to tracepoints, confidentiality closes tracefs."""
    mode = lockdown_mode()
    if mode in (None, "none"):
        return Check("lockdown", OK, "none")
    remedy = "kprobes and the function tracer may be refused; boot without lockdown= for those"
    return Check("lockdown", OPTIONAL, mode, remedy)


def check_tracefs(tracefs: Path | None) -> Check:
    """Look for the tracing file system, mounted and writable."""
    if tracefs is None:
        if not MOUNT_POINT.is_dir():
            return Check("tracefs", MISSING, "not in this kernel", "use a kernel with CONFIG_EVENT_TRACING")
        state = OPTIONAL if "CAP_SYS_ADMIN" in capabilities() else MISSING
        return Check("tracefs", state, "not mounted", f"mount -t tracefs tracefs {MOUNT_POINT} (record does it itself)")
    if not may(tracefs / "instances", os.W_OK | os.X_OK):
        try:
            read_only = os.statvfs(tracefs).f_flag & os.ST_RDONLY
        except PermissionError:  # mounted below /sys/kernel/debug only
            read_only = 0
        remedy = f"mount -o remount,rw {tracefs}" if read_only else "use sudo"
        return Check("tracefs", MISSING, f"{tracefs}, not writable", remedy)
    return Check("tracefs", OK, str(tracefs))


def _known(tracefs: Path | None, events: tuple[str, ...]) -> list[str]:
    if tracefs is None:
        return []
    return [event for event in events if _exists(tracefs / "events" / event.replace(":", "/"))]


def check_tracepoints(tracefs: Path | None) -> Check:
    """How much of the event set lifecycle the kernel has."""
    if tracefs is None or not may(tracefs / KNOWN_FORMAT, os.R_OK):
        return Check("tracepoints", OPTIONAL, "unknown without access to tracefs", "run kvmtrace doctor as root")
    known = _known(tracefs, LIFECYCLE)
    if not any(event.startswith("kvm:") for event in known):
        return Check("tracepoints", MISSING, "no kvm tracepoints", "load KVM: modprobe kvm_intel or kvm_amd")
    return Check("tracepoints", OK, f"{len(known)} of {len(LIFECYCLE)} of the set lifecycle")


def check_entry_exit(tracefs: Path | None) -> Check:
    """Look for the three events nothing works without; present does not mean that this KVM emits them."""
    if tracefs is None or not may(tracefs / KNOWN_FORMAT, os.R_OK):
        return Check("VM-entry and VM-exit", OPTIONAL, "unknown without access to tracefs")
    known = _known(tracefs, MINIMAL)
    if len(known) < len(MINIMAL):
        absent = ", ".join(sorted(set(MINIMAL) - set(known)))
        return Check("VM-entry and VM-exit", OPTIONAL, f"lacks {absent}", "load KVM")
    if "kvm_pvm" in kvm_modules():
        return Check(
            "VM-entry and VM-exit",
            OPTIONAL,
            "PVM does not emit kvm_entry and kvm_exit",
            "for real VM-exits use `kvmtrace lab run --isa vmx|svm`",
        )
    return Check("VM-entry and VM-exit", OK, ", ".join(known))


def check_kprobes(tracefs: Path | None) -> Check:
    """Probe events on the functions of PROBES."""
    if tracefs is not None and not may(tracefs, os.X_OK):
        return Check("kprobes", OPTIONAL, "unknown without access to tracefs")
    if tracefs is None or not _exists(tracefs / "kprobe_events"):
        return Check(
            "kprobes",
            OPTIONAL,
            "not in this kernel (CONFIG_KPROBE_EVENTS)",
            "tracepoints are recorded; `kvmtrace lab run` has kernels with probes",
        )
    if not may(tracefs / "kprobe_events", os.W_OK):
        return Check("kprobes", OPTIONAL, "no permission", "use sudo")
    if lockdown_mode() == "confidentiality":
        return Check("kprobes", OPTIONAL, "locked down", "boot without lockdown=confidentiality")
    wanted = {function for function, _, _ in PROBES.values()}
    symbols = {line.split()[2] for line in _read(Path("/proc/kallsyms")).splitlines()}
    return Check("kprobes", OK, "for " + (", ".join(sorted(wanted & symbols)) or "none of our functions: load KVM"))


def check_uprobes(tracefs: Path | None) -> Check:
    """Probe events on functions of the VMM."""
    if tracefs is not None and may(tracefs / "uprobe_events", os.W_OK):
        return Check("uprobes", OK, "uprobe_events")
    return Check("uprobes", OPTIONAL, "no uprobe_events, or no permission", "use sudo; CONFIG_UPROBE_EVENTS")


def check_bcc() -> Check:
    """Look for the bpf back end's compiler and loader."""
    if find_spec("bcc") is None:
        return Check(
            "bcc",
            OPTIONAL,
            "not importable",
            "apt install python3-bpfcc, and use the system Python (or link bcc into the environment)",
        )
    return Check("bcc", OK, "importable")


def check_headers() -> Check:
    """Kernel headers, which our programs do not need but others' bcc programs do."""
    source = os.environ.get("BCC_KERNEL_SOURCE")
    if source is not None:
        there = Path(source).is_dir()
        return Check(
            "kernel headers",
            OK if there else OPTIONAL,
            f"BCC_KERNEL_SOURCE={source}",
            "" if there else "that folder does not exist",
        )
    release = os.uname().release
    if Path("/lib/modules", release, "build").exists():
        return Check("kernel headers", OK, f"/lib/modules/{release}/build")
    return Check(
        "kernel headers",
        OPTIONAL,
        f"none for {release}",
        "kvmtrace's own programs need none; for others set BCC_KERNEL_SOURCE",
    )


def check_btf() -> Check:
    """Look for the kernel's type information, for fentry and raw tracepoints."""
    there = Path("/sys/kernel/btf/vmlinux").exists()
    return Check(
        "BTF",
        OK if there else OPTIONAL,
        "/sys/kernel/btf/vmlinux" if there else "none",
        "" if there else "bpf falls back to plain tracepoints (CONFIG_DEBUG_INFO_BTF)",
    )


def check_mechanisms() -> Check:
    """Say what the bpf back end can hang its programs on; it takes the newest that carries what is wanted."""
    from kvmtrace.capture.bpf.mechanisms import describe_mechanisms

    rows = describe_mechanisms()
    names = {
        name.removesuffix("tracepoint").strip() or "plain" if name.endswith("tracepoint") else name: can
        for name, can, _ in rows
    }
    tracepoints = [name for name, can in names.items() if can and "/" not in name]
    usable = ", ".join(
        [name for name, can in names.items() if can and "/" in name]
        + ([f"{', '.join(tracepoints)} tracepoints"] if tracepoints else [])
    )
    lacking = "; ".join(f"{name}: {why}" for name, can, why in rows if not can)
    return Check(
        "BPF programs on", OK if usable else OPTIONAL, usable or "nothing", f"not on {lacking}" if lacking else ""
    )


def _exists(path: Path) -> bool:
    """Say whether the path is there; also False where we may not look."""
    try:
        return path.exists()
    except PermissionError:
        return False


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
