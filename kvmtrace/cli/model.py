"""`kvmtrace model`: the reference model itself, or what it predicts for a bundled guest."""

from __future__ import annotations

import json

import click

from kvmtrace.cli.completion import guests
from kvmtrace.errors import UsageError
from kvmtrace.isa.registry import NAMES

FORMATS = ("text", "dot", "svg", "json", "rv-dot")


def render_model(isa: str | None, output_format: str) -> str:
    """Return the model in one of FORMATS."""
    if output_format in {"dot", "svg"}:
        from kvmtrace.render.model.diagram import render_dot
        from kvmtrace.render.model.diagram_svg import render_svg

        return (render_dot if output_format == "dot" else render_svg)(isa=isa)
    from kvmtrace.render.model import describe

    if output_format == "rv-dot":
        from kvmtrace.render.model.rv_dot import render_rv_dot

        return render_rv_dot()
    isas = (isa,) if isa else NAMES
    if output_format == "json":
        return json.dumps(describe.model_as_dict(isas), indent=1) + "\n"
    return describe.render_text(isas)


@click.command(
    "model",
    epilog=f"Examples: kvmtrace model --isa {NAMES[0]} | less;  kvmtrace model --format svg > lifecycle.svg;  "
    f"kvmtrace model --replay lifecycle --isa {NAMES[1]}",
)
@click.option("--isa", type=click.Choice(NAMES), help="Only this one; default: all.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="rv-dot: the automaton for the kernel's Runtime Verification (dot2k, rvgen).",
)
@click.option(
    "--replay",
    metavar="GUEST",
    shell_complete=guests,
    help=f"Print the event sequence predicted for a bundled guest ({NAMES[0]} unless --isa says otherwise).",
)
@click.option("--count", type=click.IntRange(1), help="With --replay: the guest's count argument.")
def command(*, isa: str | None, output_format: str, replay: str | None, count: int | None) -> None:
    """Show the reference model: states, transitions, what each VM-exit owes, rules, world switch."""
    if replay is None:
        if count is not None:
            raise UsageError("--count belongs to --replay")
        click.echo(render_model(isa, output_format), nl=False)
        return
    if output_format not in {"text", "json"}:
        raise UsageError("--replay prints text or json")
    from kvmtrace.render.model.prediction import render_prediction

    click.echo(render_prediction(replay, isa or NAMES[0], output_format, count), nl=False)
