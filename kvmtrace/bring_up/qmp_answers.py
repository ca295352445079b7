"""What QEMU says of itself over QMP, beside what the trace shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.bring_up.followed import QmpCheck
from kvmtrace.model.bring_up import INHERITANCE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvmtrace.bring_up.followed import KvmObject


def _threads(answer: Any) -> dict[int, int]:
    rows = answer if isinstance(answer, list) else []
    pairs = [(row.get("cpu-index"), row.get("thread-id")) for row in rows if isinstance(row, dict)]
    return {index: tid for index, tid in pairs if isinstance(index, int) and isinstance(tid, int)}


def _version(answer: Any) -> str:
    qemu = answer.get("qemu") if isinstance(answer, dict) else None
    parts = [qemu.get(part) for part in ("major", "minor", "micro")] if isinstance(qemu, dict) else []
    return ".".join(str(part) for part in parts if isinstance(part, int))


def _parents(*answers: Any) -> dict[str, str]:
    rows = [row for answer in answers if isinstance(answer, list) for row in answer if isinstance(row, dict)]
    return {str(row.get("name")): str(row.get("parent", "")) for row in rows}


def check_qmp(answers: Mapping[str, Any] | None, objects: Iterable[KvmObject]) -> QmpCheck | None:
    """Hold QEMU's answers against the objects that the trace shows.

    Parameters
    ----------
    answers : the capture's metadata `qmp`, untrusted; None if nobody was asked
    objects : of the construction
    """
    if not isinstance(answers, dict):
        return None
    if isinstance(answers.get("error"), str):
        return QmpCheck("", None, {}, (), (), answers["error"])
    threads = _threads(answers.get("cpus"))
    kvm = answers.get("kvm")
    enabled = kvm.get("enabled") if isinstance(kvm, dict) and isinstance(kvm.get("enabled"), bool) else None
    agreed: list[str] = []
    differed: list[str] = []

    def note(same: bool, text: str) -> None:
        (agreed if same else differed).append(text)

    seen = {known.number: known.run_tids for known in objects if known.kind == "vcpu" and known.number is not None}
    if enabled is not None:
        note(enabled == bool(seen), f"KVM is {'enabled' if enabled else 'disabled'}, the trace shows {len(seen)} vCPUs")
    for index, tid in threads.items():
        run = seen.get(index, ())
        if run:
            note(run == (tid,), f"vCPU {index} is thread {tid}; in the trace it was run by {', '.join(map(str, run))}")
    parents = _parents(answers.get("accel_types"), answers.get("cpu_types"))
    for chain in INHERITANCE:
        if parents.get(chain[0]):
            said = parents[chain[0]]
            note(said == chain[1], f"type {chain[0]} is a {said}; the model expects {chain[1]}")
    return QmpCheck(_version(answers.get("version")), enabled, threads, tuple(agreed), tuple(differed))
