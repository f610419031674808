"""Plan a request and estimate its cost, as plain values; no weights are loaded."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from skyloom.core.device import choose_device, choose_dtype
from skyloom.generate.estimate import (
    Estimate,
    estimate,
    read_history,
    workload_of,
)
from skyloom.generate.memory import make_planner, measure_free_memory
from skyloom.generate.plan import Plan, make_plan
from skyloom.generate.request import Request
from skyloom.generate.timeline import Generate
from skyloom.models.base import find_loader
from skyloom.models.memory import MemoryPlan
from skyloom.models.registry import DEFAULT_MODEL, find_model


def plan_and_estimate(
    request: Request, device: str | None = None
) -> tuple[Plan, Estimate, MemoryPlan | None]:
    """Plan a request and estimate time, memory and disk. Raises RequestError.

    The memory of large models is planned instead of estimated; it is None for others.
    """
    info = find_model(request.model or DEFAULT_MODEL)
    where = choose_device(device)
    cost = find_loader(info).read_network_cost(info)
    plan = make_plan(request, info, cost.scale)
    precision = choose_dtype(where)
    dtype = str(precision).removeprefix("torch.")
    workload = workload_of(plan, info, cost, device=where.type, dtype=dtype)
    expected = estimate(workload, read_history())
    free = measure_free_memory(where)
    planner = make_planner(plan, info, cost, device=where, dtype=precision, free=free)
    if planner is None:
        return plan, expected, None
    memory = planner.choose()
    return plan, replace(expected, memory_bytes=memory.host_peak), memory


def plan_to_dict(
    plan: Plan, expected: Estimate, memory: MemoryPlan | None = None
) -> dict[str, Any]:
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
    if memory is not None:
        values["memory"] = memory.to_dict()
    if plan.notices:
        values["notices"] = list(plan.notices)
    if plan.request.cards:
        values["cards"] = list(describe_cards(plan))
    if plan.request.edit is not None:
        values["spans"] = list(describe_spans(plan))
    return values


def describe_cards(plan: Plan) -> Iterator[dict[str, Any]]:
    """Describe the cards of a storyboard: frames, windows, crossfade, prompt and media."""
    shot = 1
    position = 0
    for index, span in enumerate(plan.timeline.generated_spans if plan.request.cards else ()):
        shot += index > 0 and not span.continues
        yield {
            "card": index + 1,
            "shot": shot,
            "first_frame": position,
            "frames": span.frames,
            "windows": sum(window.span == index for window in plan.windows),
            "fade_frames": span.fade_frames,
            "prompt": span.prompt,
            "pinned": None if span.media is None else span.media.path,
        }
        position += span.frames


def describe_spans(plan: Plan) -> Iterator[dict[str, Any]]:
    """Describe the spans of an edit, in order: frames, kind, and of generated ones the windows."""
    windows = iter(
        sum(window.span == index for window in run.windows)
        for run in plan.runs
        for index in range(len(run.spans))
    )
    position = 0
    for span in plan.timeline.spans if plan.request.edit is not None else ():
        row: dict[str, Any] = {
            "first_frame": position,
            "frames": span.frames,
            "kind": span.kind,
        }
        if isinstance(span, Generate):
            row["windows"] = next(windows)
            row["prompt"] = span.prompt
        yield row
        position += span.frames
