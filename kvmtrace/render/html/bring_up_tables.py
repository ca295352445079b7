"""The HTML tables of a VM's construction: its objects, the VMM's steps and calls, refusals, capabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.render.bring_up_rows import ASKED, outcomes, timeline
from kvmtrace.render.html.html_cells import (
    Cell,
    Column,
    HtmlTable,
    made,
    number,
    plain,
    returned_cell,
    table,
    text,
    time,
    time_cell,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

RETURNED = Column("returned", True, lambda row: returned_cell(row.ret))


def _after(start_ns: int) -> Column:
    return Column("after", True, lambda row: time_cell(row.ts_ns - start_ns))


def _objects(objects: Iterable[Any]) -> HtmlTable:
    columns = (
        made("object", lambda o: o.id + (" (made before the recording)" if o.assumed else "")),
        number("descriptor", "fd"),
        plain("made by thread", "tid"),
        made("run by", lambda o: ", ".join(map(str, o.run_tids))),
        text("in the kernel", "kernel_object"),
        text("file"),
    )
    return table("objects", "Objects of the VM", columns, objects)


def _steps(rows: Iterable[Any], start_ns: int) -> HtmlTable:
    columns = (
        _after(start_ns),
        time("took", "dur_ns"),
        plain("thread", "tid"),
        text("step"),
        number("times", "n"),
        number("descriptor", "fd"),
        made("on", lambda r: r.object + (f" → {r.makes}" if r.makes else "")),
        RETURNED,
        text("verdict"),
        text("", "sentence"),
    )
    caption = "What repeats itself is one row. A step without descriptor is one of the VMM's own functions."
    return table("steps", "Construction, step by step", columns, rows, caption)


def _refused(rows: Iterable[Any]) -> HtmlTable:
    columns = (
        number("times", "n"),
        text("call", "name"),
        made("on", lambda o: ", ".join(o.objects)),
        RETURNED,
        text("verdict"),
        text("", "sentence"),
        text("source"),
    )
    return table("outcomes", "What did not simply succeed", columns, rows)


def _asked(steps: Iterable[Any], start_ns: int) -> HtmlTable:
    columns = (
        _after(start_ns),
        plain("thread", "tid"),
        text("on", "object"),
        Column("capability", True, lambda s: Cell(str(s.arg), s.arg)),
        RETURNED,
    )
    return table("asked", "Capabilities asked for", columns, [step for step in steps if step.name == ASKED])


def bring_up_tables(bring_up: Any) -> list[HtmlTable]:
    """Tabulate the VM's construction: objects, the VMM's steps and calls as one, refusals, capabilities."""
    rows = timeline(bring_up)
    start_ns = rows[0].ts_ns if rows else 0
    tables = (
        _objects(bring_up.objects),
        _steps(rows, start_ns),
        _refused(outcomes(bring_up)),
        _asked(bring_up.steps, start_ns),
    )
    return [made_of for made_of in tables if made_of.rows]
