"""`skyloom plan`: estimate the cost of a video without generating it."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from skyloom.cli import options
from skyloom.models.registry import DEFAULT_MODEL

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
    model: options.Model = DEFAULT_MODEL,
    as_json: options.AsJson = False,
    device: options.Device = None,
) -> None:
    """Print shape, windows, network calls, memory, disk and time of a video; generate nothing."""
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
    """Print the plan of a request. Raises RequestError or CapacityError."""
    from skyloom.generate.estimate import check_capacity, free_memory
    from skyloom.generate.plan_summary import plan_and_estimate, plan_to_dict

    found, expected, memory = plan_and_estimate(request, device)
    if as_json:
        typer.echo(json.dumps(plan_to_dict(found, expected, memory)))
    else:
        typer.echo("\n".join(_lines(found, expected)))
        for line in () if memory is None else memory.describe():
            typer.echo(f"memory   {line}")
    if memory is not None:
        memory.check()
    check_capacity(expected, free_disk=shutil.disk_usage(Path()).free, free_memory=free_memory())


def _lines(plan: "Plan", expected: "Estimate") -> list[str]:
    """The plan as text, most important lines first."""
    from skyloom.generate.plan_summary import describe_cards, describe_spans

    work = expected.work
    frames = -(-plan.shape.frames // plan.keep_every)
    basis = "a first guess" if expected.first_guess else f"from {expected.runs} earlier runs"
    load = _duration(expected.fixed_seconds)
    denoise = _duration(expected.denoise_seconds)
    decode = _duration(expected.decode_seconds)
    rows = (
        (
            "time",
            f"{_duration(expected.seconds)} ({basis}): "
            f"loading {load}, denoising {denoise}, decoding {decode}",
        ),
        ("memory", f"{expected.memory_bytes / 2**20:,.0f} MiB"),
        ("disk", f"{expected.disk_bytes / 2**20:,.1f} MiB while it is written"),
        (
            "video",
            f"{frames} frames of {plan.shape.size} at {float(plan.fps):g} fps, {plan.seconds:g} s",
        ),
        ("windows", f"{work.windows} of {work.tokens:,} tokens at most"),
        (
            "network",
            f"{work.calls} calls: {plan.num_steps} steps a window, "
            f"guidance {plan.guidance_scale:g}",
        ),
    )
    return [
        *(f"{name:8} {text}" for name, text in rows),
        *(_card_line(card) for card in describe_cards(plan)),
        *(_span_line(span) for span in describe_spans(plan)),
        *(f"{'note':8} {notice}" for notice in plan.notices),
    ]


def _span_line(span: dict[str, Any]) -> str:
    last = span["first_frame"] + span["frames"] - 1
    windows = f", {span['windows']} windows: {span['prompt']}" if "windows" in span else ""
    return f"{span['kind']:9} frames {span['first_frame']} to {last}{windows}"


def _card_line(card: dict[str, Any]) -> str:
    last = card["first_frame"] + card["frames"] - 1
    parts = [
        f"shot {card['shot']}",
        f"frames {card['first_frame']} to {last}",
        f"{card['windows']} windows",
    ]
    if card["fade_frames"]:
        parts.append(f"fades in over {card['fade_frames']} frames")
    if card["pinned"]:
        parts.append(f"from {card['pinned']}")
    return f"card {card['card']:<3} {', '.join(parts)}: {card['prompt']}"


def _duration(seconds: float) -> str:
    """Format seconds like 4.2 s or 3 min 5 s."""
    minutes, rest = divmod(round(seconds), _MINUTE)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
