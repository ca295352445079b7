"""What a VMM's command line says of its VM: which program it is, the VM's name and uuid.

Command lines are anybody's to write: what has not the expected shape says nothing.

Sources: qemu(1), -name and -uuid, commas doubled within a value (util/qemu-option.c); cloud-hypervisor --help
(--api-socket, --platform uuid=); firecracker(1) --id, --api-sock; crosvm run --help; kvmtool, lkvm run --name.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

OURS = "kvmtrace"
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")
# names of sockets that say what listens there, not for whom: then the directory is the VM's
COMMON_SOCKETS = re.compile(
    r"(api|clh-api|ch|clh|cloud-hypervisor|firecracker|fc|crosvm|vmm|vm|control|main)([.-]?(sock|socket|api))*\Z"
)
COMMON_FOLDERS = frozenset({"", "/", "tmp", "run", "var", "root", "sockets"})


@dataclass(frozen=True)
class ToldByArguments:
    """What a command line says.

    Parameters
    ----------
    kind : "qemu" "cloud-hypervisor" "firecracker" "crosvm" "kvmtool" "kvmtrace"
    name, uuid : of the VM, None if it does not say
    name_from : "command line", or "socket": named after the VMM's socket; None without a name
    """

    kind: str
    name: str | None = None
    uuid: str | None = None
    name_from: str | None = None


def told_by_arguments(argv: Sequence[str]) -> ToldByArguments | None:
    """Return what a process's command line says; None if it is none of a known VMM."""
    if not argv:
        return None
    program = PurePosixPath(argv[0]).name
    for pattern, read in _PROGRAMS:
        if pattern.match(program):
            return read(argv)
    is_python = re.match(r"python[0-9.]*\Z", program)
    if is_python and "kvmtrace.workload" in argv[1:5]:
        return _ours(argv)
    return None


def _values(argv: Sequence[str], *options: str) -> Iterator[str]:
    """Yield the values of an option, written `--option value` or `--option=value`."""
    for at, word in enumerate(argv[1:], 1):
        if word in options and at + 1 < len(argv):
            yield argv[at + 1]
        elif word.startswith(tuple(f"{option}=" for option in options if option.startswith("--"))):
            yield word.partition("=")[2]


def _first(argv: Sequence[str], *options: str) -> str | None:
    return next(_values(argv, *options), None) or None


def _parts(text: str, implied: str = "") -> dict[str, str]:
    """Split QEMU's `key=value,key=value`, where a comma in a value is doubled; the first key may be left out."""
    found: dict[str, str] = {}
    for at, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.partition("=")
        if at == 0 and implied and not equals:
            key, value = implied, key
        found.setdefault(key, value.replace("\0", ","))
    return found


def _uuid(*texts: str | None) -> str | None:
    return next((text.lower() for text in texts if text and UUID.match(text)), None)


def _named(kind: str, name: str | None, uuid: str | None, socket: str | None = None) -> ToldByArguments:
    """Return the name as given, or else that of the socket."""
    if name:
        return ToldByArguments(kind, name, uuid, "command line")
    path = PurePosixPath(socket or "")
    name = re.sub(r"([.-](sock|socket|api))+\Z", "", path.name)
    if COMMON_SOCKETS.match(path.name):
        name = "" if path.parent.name in COMMON_FOLDERS else path.parent.name
    return ToldByArguments(kind, name or None, uuid, "socket" if name else None)


def _qemu(argv: Sequence[str]) -> ToldByArguments:
    name = _first(argv, "-name", "--name")
    machine = [_parts(text).get("uuid") for text in _values(argv, "-smbios", "--smbios")]
    guest = _parts(name, implied="guest").get("guest") if name else None
    return _named("qemu", guest, _uuid(_first(argv, "-uuid", "--uuid"), *machine))


def _cloud_hypervisor(argv: Sequence[str]) -> ToldByArguments:
    socket = _first(argv, "--api-socket")
    platform = _parts(_first(argv, "--platform") or "")
    path = _parts(socket, implied="path").get("path") if socket else None
    return _named("cloud-hypervisor", None, _uuid(platform.get("uuid")), path)


def _firecracker(argv: Sequence[str]) -> ToldByArguments:
    name = _first(argv, "--id")
    return _named("firecracker", name, _uuid(name), _first(argv, "--api-sock"))


def _crosvm(argv: Sequence[str]) -> ToldByArguments:
    return _named("crosvm", _first(argv, "--name"), None, _first(argv, "--socket", "-s"))


def _kvmtool(argv: Sequence[str]) -> ToldByArguments:
    return _named("kvmtool", _first(argv, "--name", "-n"), None)


def _ours(argv: Sequence[str]) -> ToldByArguments:
    at = argv.index("kvmtrace.workload")
    name = argv[at + 1] if at + 1 < len(argv) and not argv[at + 1].startswith("-") else None
    return _named(OURS, name, None)


# programs by the name of their file
_PROGRAMS: tuple[tuple[re.Pattern[str], Callable[[Sequence[str]], ToldByArguments]], ...] = (
    (re.compile(r"(qemu-system-.+|qemu-kvm|kvm|\.?qemu-system-.+-wrapped)\Z"), _qemu),
    (re.compile(r"cloud-hypervisor(-static)?\Z"), _cloud_hypervisor),
    (re.compile(r"firecracker(-v?[0-9.]+.*)?\Z"), _firecracker),
    (re.compile(r"crosvm\Z"), _crosvm),
    (re.compile(r"(lkvm|vm|kvmtool)(-static)?\Z"), _kvmtool),
)
