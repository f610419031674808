# pyright: basic
"""Cache keys of windows: digests of everything that determines a window's latents.

The key of a window names the spans of its shot up to its own, so that a changed card of a
storyboard invalidates its own windows and those that continue from them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from skyloom.core.version import __version__
from skyloom.generate.plan import Plan
from skyloom.generate.receipt import hash_source_file, weights_digest
from skyloom.generate.timeline import Generate, Media
from skyloom.generate.windows import RunPlan, Window
from skyloom.models.registry import ModelInfo


def window_keys(
    plan: Plan,
    run: RunPlan,
    info: ModelInfo,
    device: torch.device,
    dtype: torch.dtype,
    *,
    bounds: Mapping[str, float] | None = None,
) -> list[str]:
    """The keys of the windows of a run; `bounds` are those of its critic.

    Raises MediaError for unreadable media.
    """
    settings = {
        "skyloom": __version__,
        "weights": weights_digest(info.file_hashes),
        "device": f"{device.type} {dtype}",
        "seed": plan.seed,
        "steps": plan.num_steps,
        "guidance": plan.guidance_scale,
        "student": plan.student,
        "schedule": asdict(plan.schedule),
        "negative": plan.request.negative_prompt,
        "size": plan.shape.size,
        "mask": _mask(plan),
        "critic": None if bounds is None else [plan.request.retakes, dict(bounds)],
    }
    if plan.loras:
        settings["loras"] = [[one.sha256, one.lora.weight] for one in plan.loras]
    spans = [_span_values(plan, span) for span in run.spans]
    return [
        hashlib.sha256(
            json.dumps(
                [settings, asdict(window), _spans_seen(run, window, spans)], sort_keys=True
            ).encode()
        ).hexdigest()
        for window in run.windows
    ]


def _mask(plan: Plan) -> str | None:
    """The region of an inpainting, or the digest of its mask."""
    edit = plan.request.edit
    if edit is None:
        return None
    return edit.region if edit.mask is None else hash_source_file(Path(edit.mask))


def _span_values(plan: Plan, span: Generate) -> dict[str, Any]:
    """A span as JSON values; files are named by their digests."""
    values = asdict(span)
    for clip in (values["before"], values["after"], *values["init_clips"]):
        if clip is not None:
            assert plan.sources is not None
            source = plan.sources.sources[clip["source"]]
            clip["source"] = f"{source.sha256} {source.fps} {source.width}x{source.height}"
    values["media"] = _media_values(span.media)
    return values


def _media_values(media: Media | None) -> list[Any] | None:
    if media is None:
        return None
    return [hash_source_file(Path(media.path)), media.moving, media.strength]


def _spans_seen(run: RunPlan, window: Window, spans: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The spans of the window's shot up to its own, and the media of the following one."""
    first = window.span
    while run.spans[first].continues:
        first -= 1
    seen: list[Any] = list(spans[first : window.span + 1])
    following = window.span + 1
    if following < len(spans) and run.spans[following].continues:
        seen.append(spans[following]["media"])
    return seen
