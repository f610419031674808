"""`skyloom plan`: what a video would take, before anything is made or loaded."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyloom.cli import options

if TYPE_CHECKING:
    from skyloom.generate.estimate import Estimate
    from skyloom.generate.plan import Plan
    from skyloom.generate.request import Request

_MINUTE = 60


def plan(
    prompt: options.Prompt,
    seconds: options.Seconds = None,
    size: options.Size = None,
    fps: options.Fps = None,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    quality: options.Quality = None,
    negative: options.Negative = "",
    image: options.Picture = None,
    model: options.Model = "diorama",
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    device: options.Device = None,
) -> None:
    """What a video would take: shape, windows, network calls, memory, disk and time. Nothing is made."""
    from skyloom.generate.request import Request

    request = Request(
        prompt,
        model=model,
        seconds=seconds,
        size=size,
        fps=fps,
        seed=seed,
        num_steps=steps,
        guidance_scale=guidance,
        quality=quality,
        negative_prompt=negative,
        image=None if image is None else str(image),
    )
    show(request, as_json, device)


def show(request: "Request", as_json: bool, device: str | None) -> None:
    """Print what a request would take. Raises RequestError or CapacityError for what cannot be made."""
    from skyloom.core.device import choose_device, choose_dtype
    from skyloom.generate.estimate import (
        check_capacity,
        estimate,
        free_memory,
        read_config,
        read_history,
        work_of,
    )
    from skyloom.generate.plan import make_plan
    from skyloom.models.dit import DitConfig
    from skyloom.models.registry import find_model
    from skyloom.models.vae import VaeConfig

    info, where = find_model(request.model or "diorama"), choose_device(device)
    scale = read_config(info.folder, "vae", VaeConfig).scale
    made = make_plan(request, info, scale)
    dtype = str(choose_dtype(where)).removeprefix("torch.")
    work = work_of(made, info, read_config(info.folder, "dit", DitConfig), scale, where.type, dtype)
    expected = estimate(work, read_history())
    typer.echo(json.dumps(_table(made, expected)) if as_json else "\n".join(_lines(made, expected)))
    check_capacity(expected, free_disk=shutil.disk_usage(Path()).free, free_memory=free_memory())


def _table(plan: "Plan", expected: "Estimate") -> dict[str, object]:
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
        **({"cards": [_card(plan, index) for index in range(len(plan.cards))]} if plan.cards else {}),
        **({"spans": list(_spans(plan))} if plan.timeline else {}),
    }


def _lines(plan: "Plan", expected: "Estimate") -> list[str]:
    """What people ask about first comes first."""
    work, kept = expected.work, -(-plan.shape.frames // plan.keep_every)
    basis = "a first guess" if expected.first_guess else f"from {expected.runs} earlier runs"
    parts = (expected.fixed_seconds, expected.denoise_seconds, expected.decode_seconds)
    load, denoise, decode = map(_duration, parts)
    return [
        f"{'time':8} {_duration(expected.seconds)} ({basis}): loading {load}, denoising {denoise}, decoding {decode}",
        f"{'memory':8} {expected.memory_bytes / 2**20:,.0f} MiB",
        f"{'disk':8} {expected.disk_bytes / 2**20:,.1f} MiB while it is written",
        f"{'video':8} {kept} frames of {plan.shape.size} at {float(plan.fps):g} fps, {plan.seconds:g} s",
        f"{'windows':8} {work.windows} of {work.tokens:,} tokens at most",
        f"{'network':8} {work.calls} calls: {plan.num_steps} steps a window, guidance {plan.guidance_scale:g}",
        *(_card_line(_card(plan, index)) for index in range(len(plan.cards))),
        *(_span_line(span) for span in _spans(plan)),
    ]


def _spans(plan: "Plan") -> Iterator[dict[str, Any]]:
    """What an edit keeps and what it makes, in order."""
    from skyloom.generate.timeline import Make

    layouts, at = iter(plan.layouts), 0
    for span in plan.timeline.spans if plan.timeline else ():
        told = {"first_frame": at, "frames": span.frames, "kind": type(span).__name__.lower()}
        yield {**told, "windows": len(next(layouts).windows), "prompt": span.prompt} if isinstance(span, Make) else told
        at += span.frames


def _span_line(span: dict[str, Any]) -> str:
    last = span["first_frame"] + span["frames"] - 1
    made = f", {span['windows']} windows: {span['prompt']}" if "windows" in span else ""
    return f"{span['kind']:8} frames {span['first_frame']} to {last}{made}"


def _card(plan: "Plan", index: int) -> dict[str, Any]:
    """A card of a storyboard on its frames."""
    one = plan.cards[index]
    end = plan.cards[index + 1].frame if index + 1 < len(plan.cards) else plan.shape.frames
    windows = sum(window.card == index for window in plan.windows)
    place = {"card": index + 1, "shot": one.shot + 1, "first_frame": one.frame, "frames": end - one.frame}
    return {**place, "windows": windows, "fade_frames": one.fade, "prompt": one.text, "pinned": one.pinned}


def _card_line(card: dict[str, Any]) -> str:
    last = card["first_frame"] + card["frames"] - 1
    fade = f", fades in over {card['fade_frames']} frames" if card["fade_frames"] else ""
    pinned = f", from {card['pinned']}" if card["pinned"] else ""
    where = f"shot {card['shot']}, frames {card['first_frame']} to {last}, {card['windows']} windows{fade}{pinned}"
    return f"card {card['card']:<3} {where}: {card['prompt']}"


def _duration(seconds: float) -> str:
    """Like 4.2 s or 3 min 5 s."""
    minutes, rest = divmod(round(seconds), _MINUTE)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
