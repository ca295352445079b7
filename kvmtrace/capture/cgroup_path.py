r"""What the cgroup of a VMM says of its VM: libvirt's machine scope, a systemd unit, a Kubernetes pod, a container.

Sources: systemd.unit(5), escaping; systemd-machined's scopes `machine-DRIVER\x2dID\x2dNAME.scope` (libvirt,
src/util/virsystemd.c); kubelet's cgroup drivers, pkg/kubelet/cm (pod uids with _ for - under systemd).
"""

from __future__ import annotations

import re

from kvmtrace.lazy_dataclass import dataclass

_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")
_LIBVIRT = re.compile(r"machine-([a-z]+)-([0-9]+)-(.+)\.scope\Z")
_POD = re.compile(r"(?:\A|-)pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?\Z")
_CONTAINER = re.compile(r"(?:\A|-)([0-9a-f]{64})(?:\.scope)?\Z")
_INSTANCE = re.compile(r"[^@]+@(.+)\.service\Z")
_PROXMOX = re.compile(r"/qemu\.slice/([0-9]+)\.scope(/|\Z)")
_NO_VMS = re.compile(r"(user|user-runtime-dir|getty|serial-getty|session-.*)@")


@dataclass(frozen=True)
class ToldByCgroup:
    """What a cgroup's path says.

    Parameters
    ----------
    name : the VM's name, None if nothing says it
    unit : the systemd unit, unescaped
    pod : uid of the Kubernetes pod
    container : id of the container, its first 12 digits
    """

    name: str | None = None
    unit: str | None = None
    pod: str | None = None
    container: str | None = None


def cgroups_of(text: str) -> list[str]:
    """Return the paths of a process's cgroups from the text of /proc/PID/cgroup: version 2, systemd's, the others."""
    paths: list[tuple[int, str]] = []
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        rank = 0 if number == "0" else 1 if "name=systemd" in controllers else 2
        paths.append((rank, path))
    return list(dict.fromkeys(path for _, path in sorted(paths, key=lambda item: item[0])))


def told_by_cgroups(text: str) -> ToldByCgroup:
    """Return what /proc/PID/cgroup says: of its cgroups, the first that says who the VM is."""
    told = [told_by_cgroup(path) for path in cgroups_of(text)]
    telling = [one for one in told if one.name or one.pod] + [one for one in told if one.unit or one.container]
    return telling[0] if telling else ToldByCgroup()


def told_by_cgroup(path: str) -> ToldByCgroup:
    """Return what a cgroup's path says."""
    parts = [_unescaped(part) for part in path.split("/") if part]
    units = [part for part in parts if part.endswith((".scope", ".service"))]
    unit = units[-1] if units else None
    pods = [match[1].replace("_", "-") for part in parts if (match := _POD.search(part))]
    containers = [match[1][:12] for part in parts if (match := _CONTAINER.search(part))]
    return ToldByCgroup(_name(path, units), unit, pods[-1] if pods else None, containers[-1] if containers else None)


def _name(path: str, units: list[str]) -> str | None:
    """Return the VM's name: of libvirt's scope, of Proxmox', or of a unit's instance (firecracker@web.service)."""
    for unit in reversed(units):
        if match := _LIBVIRT.match(unit):
            return match[3]
        if (match := _INSTANCE.match(unit)) and not _NO_VMS.match(unit):
            return match[1]
    found = _PROXMOX.search(path)
    return found[1] if found else None


def _unescaped(part: str) -> str:
    """Undo systemd's escapes; a byte that is no text is shown as one."""
    raw = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), part)
    try:
        return raw.encode("latin-1").decode("utf-8", "replace")
    except UnicodeEncodeError:  # it was text already
        return raw
