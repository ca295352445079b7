"""results.json, and the page docs/history.md that shows them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from history.catalogue import FOUND, all_bugs, put_back

if TYPE_CHECKING:
    from collections.abc import Iterable

    from history.catalogue import Bug

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
HEAD = HERE / "head.md"
PAGE = HERE.parents[2] / "docs" / "history.md"
_COLUMNS = ("bug", "what went wrong", "lab", "found as", "rules", "distance", "names", "alarms on the twin")

Told = dict[str, Any]


def write_results(results: list[Told]) -> None:
    """Put results beside those that are kept, and write the page again; what was not recorded is no result."""
    kept = {(old["bug"], old["isa"]): old for old in read_results()}
    kept |= {(new["bug"], new["isa"]): new for new in results if new["found"] != "not recorded"}
    known = {(bug.name, isa) for bug in put_back() for isa in bug.isas}
    lines = [json.dumps(kept[key]) for key in sorted(kept) if key in known]
    RESULTS.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    PAGE.write_text(page(read_results()))


def read_results() -> list[Told]:
    """Return the results that are kept."""
    told: list[Told] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return told


def page(results: list[Told]) -> str:
    """Return docs/history.md."""
    bugs = {bug.name: bug for bug in all_bugs()}
    built = [bug for bug in bugs.values() if bug.edits]
    lines = [HEAD.read_text().format(judged=len(bugs), built=len(built)), "## Results", ""]
    lines += [*_totals(results, bugs), "", _table(_COLUMNS, (_row(one, bugs[one["bug"]]) for one in results)), ""]
    lines += ["## What was put back, one by one", ""]
    for bug in built:
        lines += _about(bug, [result for result in results if result["bug"] == bug.name])
    left_out = ((_named(bug), bug.fault, bug.left_out) for bug in bugs.values() if bug.left_out)
    lines += ["## What was left out", "", _table(("fix", "what went wrong", "why it is left out"), left_out)]
    return "\n".join(lines) + "\n"


def _named(bug: Bug) -> str:
    where = f"`{bug.commit[:12]}`, {bug.where}" if bug.commit else f"{bug.where}; its id could not be looked up"
    return f"{bug.subject} ({where})"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(columns)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _row(result: Told, bug: Bug) -> list[str]:
    return [
        f"[{bug.name}](#{bug.name})",
        bug.fault,
        result["isa"],
        result["found"] if bug.happened(result["isa"]) else f"{result['found']}: did not happen",
        ", ".join(f"{rule} {count}" for rule, count in result["rules"].items()) or "-",
        "-" if result["distance"] is None else str(result["distance"]),
        result["named"] or "-",
        str(result["false_alarms"]),
    ]


def short_table(results: list[Told]) -> str:
    """Return the table that README has."""
    bugs = {bug.name: bug for bug in all_bugs()}
    rows = []
    for isa in ("svm", "vmx"):
        mine = [result for result in results if result["isa"] == isa]
        counts = Counter(result["found"] for result in mine)
        idle = sum(not bugs[result["bug"]].happened(isa) for result in mine)
        alarms = sum(result["false_alarms"] for result in mine)
        told = (len(mine), *(counts[word] for word in FOUND), idle, alarms)
        rows.append([f"{isa} lab", *map(str, told)])
    columns = (
        "",
        "faulty builds",
        "violation",
        "suspicion",
        "not found",
        "of these did not happen there",
        "findings on twins",
    )
    return _table(columns, rows)


def _totals(results: list[Told], bugs: dict[str, Bug]) -> list[str]:
    lines = []
    for isa in ("svm", "vmx"):
        mine = [result for result in results if result["isa"] == isa]
        if not mine:
            lines.append(f"* {isa}: not run yet.")
            continue
        counts = Counter(result["found"] for result in mine)
        words = ", ".join(f"{counts[word]} {word}" for word in FOUND if counts[word])
        idle = sum(not bugs[result["bug"]].happened(isa) for result in mine)
        words += f" ({idle} of them did not happen in the lab)" if idle else ""
        alarms = sum(result["false_alarms"] for result in mine)
        lines.append(f"* {isa}: {len(mine)} run: {words or '-'}. Findings on the healthy twins: {alarms}.")
    probed = [result["probe"] for result in results if result.get("probe")]
    lines.append(
        f"* Of those not found, {len(probed)} were recorded with a probe or tracepoint beside the events: it tells "
        f"{probed.count('shown')} of them from their twins."
    )
    found = [result for result in results if result["first"]]
    names = Counter(result["named"] for result in found)
    near = [result["distance"] for result in found if result["distance"] is not None]
    lines.append(
        f"* Of the {len(found)} found, {names['function']} name the faulty function, {names['file']} its file, "
        f"{names['no']} neither."
    )
    lines.append(
        f"* Of {len(near)} whose moment is in the recording, {sum(one == 0 for one in near)} are found before the next "
        f"VM-exit, {sum(one <= 2 for one in near)} within two."
    )
    return lines


def _about(bug: Bug, results: list[Told]) -> list[str]:
    lines = [f"### {bug.name}", "", f"{_named(bug)}; {bug.area}.", "", bug.fault, ""]
    parameters = f" with {', '.join(bug.parameters)}" if bug.parameters else ""
    lines += [f"* Guest: `kvmtrace record {' '.join(bug.trigger)}`{parameters}", f"* A recording shows: {bug.trace}"]
    for result in results:
        if result["first"]:
            lines.append(f"* {result['isa']}: {result['first']} ({result['source']})")
        if result["kernel_log"]:
            lines.append(f"* {result['isa']}, the kernel's own word: {result['kernel_log']}")
        sign = (bug.sign or {}).get(result["isa"], "")
        if sign and result["found"] == "invisible":
            lines.append(f"* {result['isa']}, the fault's own sign: {sign}")
        if result.get("probe"):
            probes = ", ".join(f"`{probe}`" for probe in bug.probes)
            lines.append(f"* {result['isa']}, recorded beside it: {probes}. The fault is {result['probe']} by it.")
    if bug.why:
        lines.append(f"* What would show it: {bug.why}")
    return [*lines, ""]
