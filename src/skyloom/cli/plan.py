"""`skyloom plan`: what a video would take, before anything is made or loaded."""

import json
import shutil
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
    from skyloom.generate.estimate import check_capacity, free_memory
    from skyloom.generate.plan_summary import describe, foresee

    made, expected = foresee(request, device)
    typer.echo(
        json.dumps(describe(made, expected)) if as_json else "\n".join(_lines(made, expected))
    )
    check_capacity(expected, free_disk=shutil.disk_usage(Path()).free, free_memory=free_memory())


def _lines(plan: "Plan", expected: "Estimate") -> list[str]:
    """What people ask about first comes first."""
    from skyloom.generate.plan_summary import describe_card, describe_spans

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
        *(_card_line(describe_card(plan, index)) for index in range(len(plan.cards))),
        *(_span_line(span) for span in describe_spans(plan)),
    ]


def _span_line(span: dict[str, Any]) -> str:
    last = span["first_frame"] + span["frames"] - 1
    made = f", {span['windows']} windows: {span['prompt']}" if "windows" in span else ""
    return f"{span['kind']:8} frames {span['first_frame']} to {last}{made}"


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
