"""A plan and its estimate as plain values, for people, the command line and the server; nothing is loaded."""

from collections.abc import Iterator
from typing import Any

from skyloom.core.device import choose_device, choose_dtype
from skyloom.generate.estimate import Estimate, estimate, read_config, read_history, work_of
from skyloom.generate.plan import Plan, make_plan
from skyloom.generate.request import Request
from skyloom.generate.timeline import Filter, Generate, Keep
from skyloom.models.dit import DitConfig
from skyloom.models.registry import DEFAULT_MODEL, find_model
from skyloom.models.vae import VaeConfig

_SPAN_KINDS = {Keep: "keep", Generate: "make", Filter: "filter"}


def foresee(request: Request, device: str | None = None) -> tuple[Plan, Estimate]:
    """The plan of a request and what it would take. Raises RequestError for what cannot be made."""
    info, where = find_model(request.model or DEFAULT_MODEL), choose_device(device)
    scale = read_config(info.folder, "vae", VaeConfig).scale
    plan = make_plan(request, info, scale)
    dtype = str(choose_dtype(where)).removeprefix("torch.")
    work = work_of(plan, info, read_config(info.folder, "dit", DitConfig), scale, where.type, dtype)
    return plan, estimate(work, read_history())


def describe(plan: Plan, expected: Estimate) -> dict[str, Any]:
    """Everything, as JSON has it."""
    return {
        "frames": plan.shape.frames,
        "kept_frames": -(-plan.shape.frames // plan.keep_every),
        "size": plan.shape.size,
        "fps": float(plan.fps),
        "steps": plan.num_steps,
        "guidance": plan.guidance_scale,
        "quality": "fast" if plan.student else "best",
        "estimate": expected.to_dict(),
        **(
            {"cards": [describe_card(plan, index) for index in range(len(plan.cards))]}
            if plan.cards
            else {}
        ),
        **({"spans": list(describe_spans(plan))} if plan.timeline else {}),
    }


def describe_card(plan: Plan, index: int) -> dict[str, Any]:
    """A card of a storyboard on its frames."""
    one = plan.cards[index]
    end = plan.cards[index + 1].frame if index + 1 < len(plan.cards) else plan.shape.frames
    windows = sum(window.card == index for window in plan.windows)
    place = {
        "card": index + 1,
        "shot": one.shot + 1,
        "first_frame": one.frame,
        "frames": end - one.frame,
    }
    return {
        **place,
        "windows": windows,
        "fade_frames": one.fade,
        "prompt": one.text,
        "pinned": one.pinned,
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
