"""What the model predicts for a bundled guest, as text or JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from kvmtrace.predict.story import Prediction


def _predictions(guest_name: str, isa: str, count: int | None) -> tuple[Prediction, ...]:
    """Predict a bundled guest's events, its arguments at their defaults but for `count`."""
    from kvmtrace.predict.guest_prediction import predict
    from kvmtrace.predict.story import Facts
    from kvmtrace.workload.machines import machine_of

    guests = machine_of(isa).guests
    guest = guests.get(guest_name)
    if guest is None:
        raise UsageError(f"there is no bundled guest {guest_name}; there are {', '.join(guests)}")
    arguments = {argument.name: argument.default for argument in guest.arguments}
    if count is not None:
        if "count" not in arguments:
            raise UsageError(f"the guest {guest_name} takes no count")
        arguments["count"] = count
    return predict(guest, arguments, Facts(isa))


def _step_as_dict(step: Any) -> dict[str, Any]:
    fields = {item.name: item.value.hex() if isinstance(item.value, bytes) else item.value for item in step.fields}
    return {
        "event": step.event,
        "fields": fields,
        "address": step.address,
        "text": step.text,
        "why": step.why,
        "optional": step.optional,
    }


def render_prediction(guest_name: str, isa: str, output_format: str, count: int | None = None) -> str:
    """Return the predicted sequence of a guest's events as text or JSON."""
    from kvmtrace.predict.story import describe_step

    predictions = _predictions(guest_name, isa, count)
    if output_format == "json":
        document = {
            "schema": "kvmtrace.prediction/1",
            "guest": guest_name,
            "isa": isa,
            "vcpus": [
                {"vcpu_id": each.vcpu_id, "steps": [_step_as_dict(step) for step in each.steps]} for each in predictions
            ],
        }
        return json.dumps(document, indent=1) + "\n"
    lines = [f"guest {guest_name} on {isa}: predicted events, before anything is recorded"]
    for each in predictions:
        lines.append(f"vCPU {each.vcpu_id}: {len(each):,} events")
        instruction = ""
        for step in each.steps:
            here = f"{step.address:#06x}  {step.text}" if step.text else ""
            if here and here != instruction:
                lines.append(f"  {here}")
            instruction = here or instruction
            lines.append(f"      {'? ' if step.optional else ''}{describe_step(step)}")
    return "\n".join(lines) + "\n"
