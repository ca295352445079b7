"""The system calls bpf(2) and perf_event_open(2), as far as the recorder needs them.

bcc compiles; loading is done here, because it needs what bcc 0.26 does not offer: maps created before the
program is compiled, ring buffers inside an array of maps, kernel variables, functions of modules.

Numbers and layouts: include/uapi/linux/bpf.h, include/uapi/linux/perf_event.h; numbers of system calls:
arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h (arm64).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct

from kvmtrace.errors import RESOURCES, CapabilityError
from kvmtrace.lazy_dataclass import dataclass

# machine -> bpf, perf_event_open, membarrier
SYSTEM_CALLS = {"x86_64": (321, 298, 324), "aarch64": (280, 241, 283)}
# of another machine they are refused
SYS_BPF, SYS_PERF_EVENT_OPEN, SYS_MEMBARRIER = SYSTEM_CALLS.get(os.uname().machine, (-1, -1, -1))
MEMBARRIER_CMD_GLOBAL = 1

MAP_CREATE, MAP_LOOKUP, MAP_UPDATE, MAP_DELETE, MAP_NEXT_KEY, PROG_LOAD = range(6)
MAP_LOOKUP_AND_DELETE = 21  # include/uapi/linux/bpf.h, enum bpf_cmd
PROG_NEXT_ID, PROG_FD_BY_ID = 11, 13
OBJ_GET_INFO = 15
RAW_TRACEPOINT_OPEN = 17
BTF_GET_FD_BY_ID = 19
BTF_GET_NEXT_ID = 23

MAP_TYPE_HASH, MAP_TYPE_ARRAY, MAP_TYPE_ARRAY_OF_MAPS, MAP_TYPE_QUEUE, MAP_TYPE_RINGBUF = 1, 2, 12, 22, 27
BPF_F_MMAPABLE = 1 << 10

PROG_TYPE_KPROBE, PROG_TYPE_TRACEPOINT, PROG_TYPE_RAW_TRACEPOINT, PROG_TYPE_TRACING = 2, 5, 17, 26
ATTACH_TRACE_RAW_TP, ATTACH_TRACE_FENTRY, ATTACH_TRACE_FEXIT = 23, 24, 25

PERF_TYPE_TRACEPOINT = 2
PERF_EVENT_IOC_SET_BPF = 0x40042408
PERF_FLAG_FD_CLOEXEC = 8
PERF_ATTR_SIZE = 128
PERF_DISABLED = 1

LOG_BYTES = 1 << 20
PROGRAM_PREFIX = "kvmt_"  # of the names under which the kernel lists our programs

_libc = ctypes.CDLL(None, use_errno=True)


def raw_syscall(number: int, *arguments: object) -> int:
    """Call syscall(2); an error becomes an OSError."""
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def bpf(command: int, attributes: bytes) -> int:
    """Call bpf(2); `attributes` is union bpf_attr as far as it matters, the kernel takes the rest as 0."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    return raw_syscall(SYS_BPF, ctypes.c_int(command), buffer, ctypes.c_uint(len(attributes)))


def address_of(buffer: ctypes.Array[ctypes.c_char]) -> int:
    """Return the address that goes into bpf_attr."""
    return ctypes.addressof(buffer)


def synchronize_rcu() -> None:
    """Return once every program that was running on any CPU has ended (a grace period, some milliseconds)."""
    raw_syscall(SYS_MEMBARRIER, ctypes.c_int(MEMBARRIER_CMD_GLOBAL), ctypes.c_uint(0), ctypes.c_int(0))


@dataclass
class BpfMap:
    """A map, open until `close`.

    Parameters
    ----------
    fd : int
    key_bytes, value_bytes : int
    """

    fd: int
    key_bytes: int
    value_bytes: int

    def update(self, key: bytes, value: bytes) -> None:
        """Set an element."""
        k, v = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
        bpf(MAP_UPDATE, struct.pack("<IIQQQ", self.fd, 0, address_of(k), address_of(v), 0))

    def pop(self) -> bytes | None:
        """Take the oldest value out of a queue, None if it is empty."""
        v = ctypes.create_string_buffer(self.value_bytes)
        try:
            bpf(MAP_LOOKUP_AND_DELETE, struct.pack("<IIQQQ", self.fd, 0, 0, address_of(v), 0))
        except FileNotFoundError:
            return None
        return v.raw

    def delete(self, key: bytes) -> None:
        """Remove an element; that it is gone already is no error."""
        k = ctypes.create_string_buffer(key, len(key))
        with contextlib.suppress(FileNotFoundError):
            bpf(MAP_DELETE, struct.pack("<IIQQQ", self.fd, 0, address_of(k), 0, 0))

    def push(self, value: bytes) -> None:
        """Add a value to a queue."""
        v = ctypes.create_string_buffer(value, len(value))
        bpf(MAP_UPDATE, struct.pack("<IIQQQ", self.fd, 0, 0, address_of(v), 0))

    def lookup(self, key: bytes) -> bytes | None:
        """Return an element's value, None where there is none."""
        k, v = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(self.value_bytes)
        try:
            bpf(MAP_LOOKUP, struct.pack("<IIQQQ", self.fd, 0, address_of(k), address_of(v), 0))
        except FileNotFoundError:
            return None
        return v.raw

    def keys(self) -> list[bytes]:
        """Return all keys; a map that changes meanwhile may give some twice or not at all."""
        found: dict[bytes, None] = {}
        here: bytes | None = None
        while True:
            k = ctypes.create_string_buffer(here or b"", self.key_bytes)
            after = ctypes.create_string_buffer(self.key_bytes)
            try:
                bpf(MAP_NEXT_KEY, struct.pack("<IIQQ", self.fd, 0, address_of(k) if here else 0, address_of(after)))
            except FileNotFoundError:
                return list(found)
            here = after.raw
            if here in found:  # the map was rearranged under us
                return list(found)
            found[here] = None

    def close(self) -> None:
        """Give the map back."""
        os.close(self.fd)


def object_name(name: str) -> bytes:
    """Return the name as the kernel takes it for maps and programs: 15 letters, digits, _ and dots."""
    return "".join(c if c.isalnum() else "_" for c in name).encode()[:15]


def loaded_programs() -> list[str]:
    """Name the programs of ours that the kernel holds now, whoever loaded them."""
    return list(_loaded().values())


def loaded_ids() -> set[int]:
    """Return the ids of the programs of ours that the kernel holds now."""
    return set(_loaded())


def _loaded() -> dict[int, str]:
    found: dict[int, str] = {}
    number = 0
    while True:
        buffer = ctypes.create_string_buffer(struct.pack("<III", number, 0, 0), 12)
        try:
            raw_syscall(SYS_BPF, ctypes.c_int(PROG_NEXT_ID), buffer, ctypes.c_uint(12))
            number = struct.unpack_from("<I", buffer.raw, 4)[0]
            fd = bpf(PROG_FD_BY_ID, struct.pack("<III", number, 0, 0))
        except FileNotFoundError:  # the last one, or one that just went
            if buffer.raw[4:8] == bytes(4):
                return found
            continue
        info = ctypes.create_string_buffer(256)
        bpf(OBJ_GET_INFO, struct.pack("<IIQ", fd, len(info), address_of(info)))
        os.close(fd)
        name = info.raw[64:80].partition(b"\0")[0].decode("ascii", "replace")
        if name.startswith(PROGRAM_PREFIX):
            found[number] = name


def create_map(
    name: str, map_type: int, key_bytes: int, value_bytes: int, entries: int, *, flags: int = 0, inner_fd: int = 0
) -> BpfMap:
    """Create a map.

    Raises
    ------
    CapabilityError
        No privilege, or the kernel does not know this type of map.
    """
    attributes = struct.pack("<7I16s", map_type, key_bytes, value_bytes, entries, flags, inner_fd, 0, object_name(name))
    try:
        return BpfMap(bpf(MAP_CREATE, attributes), key_bytes, value_bytes)
    except PermissionError:
        raise CapabilityError(
            "no permission to create BPF maps", "run as root, or with CAP_BPF and CAP_PERFMON"
        ) from None
    except OSError as error:
        if error.errno == errno.EINVAL and map_type == MAP_TYPE_RINGBUF:
            raise CapabilityError("this kernel has no BPF ring buffer (Linux 5.8)", "use --backend ftrace") from None
        remedy = RESOURCES.get(error.errno or 0, "")
        raise CapabilityError(f"the kernel refused the BPF map {name}: {error.strerror}", remedy) from None


def load_program(
    name: str, program_type: int, instructions: bytes, *, attach_type: int = 0, btf_id: int = 0, btf_fd: int = 0
) -> int:
    """Load a program and return its file descriptor.

    Raises
    ------
    CapabilityError
        The kernel refused it; the message ends with the verifier's last line.
    """
    code, n_instructions = ctypes.create_string_buffer(instructions, len(instructions)), len(instructions) // 8
    license_text, label = ctypes.create_string_buffer(b"GPL"), object_name(PROGRAM_PREFIX + name)

    def attributes(log: ctypes.Array[ctypes.c_char] | None) -> bytes:
        return struct.pack(
            "<IIQQIIQII16sIIIIQIIQIII",
            program_type,
            n_instructions,
            address_of(code),
            address_of(license_text),
            1 if log else 0,
            len(log) if log else 0,
            address_of(log) if log else 0,
            0,
            0,
            label,
            0,
            attach_type,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            btf_id,
            btf_fd,
        )

    try:
        return bpf(PROG_LOAD, attributes(None))
    except OSError as first:
        log = ctypes.create_string_buffer(LOG_BYTES)
        try:
            return bpf(PROG_LOAD, attributes(log))
        except OSError:
            raise _refusal(name, first, log.value) from None


def _refusal(name: str, error: OSError, log: bytes) -> CapabilityError:
    lines = [
        line
        for line in log.decode("utf-8", "replace").splitlines()
        if line.strip() and not line.startswith(("processed", "verification time", "stack depth"))
    ]
    why = f": {lines[-1].strip()}" if lines else ""
    remedies = RESOURCES | {errno.EPERM: "run as root, or with CAP_BPF and CAP_PERFMON"}
    remedy = remedies.get(error.errno or 0, "use --backend ftrace")
    return CapabilityError(f"the kernel refused the BPF program {name} ({error.strerror}{why})", remedy)


def perf_event_open(
    event_type: int, config: int, *, config1: int = 0, config2: int = 0, pid: int = -1, cpu: int = 0
) -> int:
    """Open a perf event that only serves to hang a BPF program on.

    It stays disabled, so it counts nothing itself, and programs that let the event pass (return 1) cost nothing more.
    """
    attributes = struct.pack(
        "<IIQQQQQIIQQ", event_type, PERF_ATTR_SIZE, config, 0, 0, 0, PERF_DISABLED, 0, 0, config1, config2
    )
    buffer = ctypes.create_string_buffer(attributes, PERF_ATTR_SIZE)
    return raw_syscall(
        SYS_PERF_EVENT_OPEN,
        buffer,
        ctypes.c_int(pid),
        ctypes.c_int(cpu),
        ctypes.c_int(-1),
        ctypes.c_ulong(PERF_FLAG_FD_CLOEXEC),
    )


def hang_program(event_fd: int, program_fd: int) -> None:
    """Run the program whenever the event happens, on every CPU, until either descriptor is closed."""
    fcntl.ioctl(event_fd, PERF_EVENT_IOC_SET_BPF, program_fd)


def open_tracing_link(program_fd: int) -> int:
    """Attach a loaded fentry, fexit or BTF tracepoint program; it stays until the returned descriptor is closed."""
    return bpf(RAW_TRACEPOINT_OPEN, struct.pack("<QII", 0, program_fd, 0))


def open_raw_tracepoint(name: str, program_fd: int) -> int:
    """Run a raw tracepoint program at a tracepoint of that name until the returned descriptor is closed."""
    text = ctypes.create_string_buffer(name.encode())
    return bpf(RAW_TRACEPOINT_OPEN, struct.pack("<QII", address_of(text), program_fd, 0))


def program_misses(program_fd: int) -> int | None:
    """Return how often the program was skipped because one was already running on that CPU; None if unknown."""
    info = ctypes.create_string_buffer(256)
    attributes = struct.pack("<IIQ", program_fd, len(info), address_of(info))
    bpf(OBJ_GET_INFO, attributes)
    # struct bpf_prog_info: recursion_misses at 208, since Linux 5.12
    return int(struct.unpack_from("<Q", info.raw, 208)[0])
