"""A recording of ours with other metadata."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.settings import META_MAGIC

if TYPE_CHECKING:
    from pathlib import Path

HOST_PIDS = {"web-1": 300, "db": 301}
WEB_UUID = "0f0f0f0f-1111-2222-3333-444444444444"


def read_meta(path: Path) -> dict[str, Any]:
    """Return the metadata of a trace.dat's trailer."""
    data = path.read_bytes()
    meta: dict[str, Any] = json.loads(data[_begin(data) : -24])
    return meta


def write_with_meta(source: Path, meta: dict[str, Any], path: Path) -> Path:
    """Write a trace.dat with another trailer."""
    data = source.read_bytes()
    text = json.dumps(meta).encode()
    path.write_bytes(data[: _begin(data)] + text + struct.pack("<Q", len(text)) + META_MAGIC)
    return path


def _begin(data: bytes) -> int:
    assert data.endswith(META_MAGIC)
    return len(data) - 24 - int(struct.unpack("<Q", data[-24:-16])[0])


def two_vms(source: Path, path: Path) -> Path:
    """Write a recording of a guest with two vCPUs as if each belonged to a VM of its own, web-1 and db."""
    meta = read_meta(source)
    tids = meta.pop("guest_run")["vcpu_tids"]
    meta["target"] = {"kind": "all", "pids": []}
    web, db = HOST_PIDS["web-1"], HOST_PIDS["db"]
    meta["threads"] |= {str(tids["0"]): [web, "CPU 0/KVM"], str(tids["1"]): [db, "CPU 0/KVM"]}
    meta["vms"] = [
        {"pid": web, "kind": "qemu", "comm": "qemu-system-x86", "name": "web-1", "uuid": WEB_UUID,
         "unit": "machine-qemu-1-web-1.scope", "vcpus": {str(tids["0"]): 0}, "debugfs": ["300-12"]},
        {"pid": db, "kind": "firecracker", "comm": "firecracker", "name": "db", "uuid": None, "vcpus": {}},
        {"pid": 999, "kind": "qemu", "name": "idle"},
    ]  # fmt: skip
    return write_with_meta(source, meta, path)
