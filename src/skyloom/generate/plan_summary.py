"""Plan a request and estimate its cost, as plain values; no weights are loaded."""

from collections.abc import Iterator
from typing import Any

from skyloom.core.device import choose_device, choose_dtype
from skyloom.generate.estimate import (
    Estimate,
    estimate,
    read_history,
    workload_of,
)
from skyloom.generate.plan import Plan, make_plan
from skyloom.generate.request import Request
from skyloom.generate.timeline import Filter, Generate, Keep
from skyloom.models.base import read_network_cost
from skyloom.models.registry import DEFAULT_MODEL, find_model

_SPAN_KINDS = {Keep: "keep", Generate: "make", Filter: "filter"}


def plan_and_estimate(request: Request, device: str | None = None) -> tuple[Plan, Estimate]:
    """Plan a request and estimate time, memory and disk. Raises RequestError."""
    info = find_model(request.model or DEFAULT_MODEL)
    where = choose_device(device)
    cost = read_network_cost(info)
    plan = make_plan(request, info, cost.scale)
    dtype = str(choose_dtype(where)).removeprefix("torch.")
    workload = workload_of(plan, info, cost, device=where.type, dtype=dtype)
    return plan, estimate(workload, read_history())


def plan_to_dict(plan: Plan, expected: Estimate) -> dict[str, Any]:
    """A plan and its estimate as JSON values."""
    values: dict[str, Any] = {
        "frames": plan.shape.frames,
        "kept_frames": -(-plan.shape.frames // plan.keep_every),
        "size": plan.shape.size,
        "fps": float(plan.fps),
        "steps": plan.num_steps,
        "guidance": plan.guidance_scale,
        "quality": "fast" if plan.student else "best",
        "estimate": expected.to_dict(),
    }
    if plan.cards:
        values["cards"] = [describe_card(plan, index) for index in range(len(plan.cards))]
    if plan.timeline:
        values["spans"] = list(describe_spans(plan))
    return values


def describe_card(plan: Plan, index: int) -> dict[str, Any]:
    """Describe a card of a storyboard: its frames, windows, crossfade, prompt and media."""
    placed = plan.cards[index]
    end = plan.cards[index + 1].frame if index + 1 < len(plan.cards) else plan.shape.frames
    return {
        "card": index + 1,
        "shot": placed.shot + 1,
        "first_frame": placed.frame,
        "frames": end - placed.frame,
        "windows": sum(window.card == index for window in plan.windows),
        "fade_frames": placed.fade_frames,
        "prompt": placed.text,
        "pinned": placed.media,
    }


def describe_spans(plan: Plan) -> Iterator[dict[str, Any]]:
    """Describe the spans of an edit, in order: frames, kind, and of generated ones the windows."""
    layouts = iter(plan.layouts)
    position = 0
    for span in plan.timeline.spans if plan.timeline else ():
        row: dict[str, Any] = {
            "first_frame": position,
            "frames": span.frames,
            "kind": _SPAN_KINDS[type(span)],
        }
        if isinstance(span, Generate):
            row["windows"] = len(next(layouts).windows)
            row["prompt"] = span.prompt
        yield row
        position += span.frames
