"""`skyloom generate`: a sentence in, a video file out."""

import json
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyloom.cli import options

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from rich.progress import TaskID
    from torch import Tensor

    from skyloom.generate.pipeline import Step
    from skyloom.generate.plan import Plan
    from skyloom.generate.request import Request
    from skyloom.generate.rollout import Critic
    from skyloom.media.write import VideoWriter

_SLUG_LENGTH = 60


def generate(
    prompt: options.Prompt,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File (.mp4, .webm, .gif) (default: named after the prompt)"
        ),
    ] = None,
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
    retake: options.Retake = None,
    preview: Annotated[
        Path | None, typer.Option(help="Keep a PNG of the video in the making here.")
    ] = None,
    play: options.Play = None,
    receipt: options.Receipt = True,
    sidecar: options.Sidecar = False,
    credentials: options.Credentials = True,
    resume_dir: options.ResumeDir = None,
    force: options.Force = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON about the result.")
    ] = False,
    device: options.Device = None,
) -> None:
    """Make a video from a sentence."""
    from skyloom.generate.request import Request

    playing = options.plays(play)
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
        retakes=retake,
    )
    request = with_seed(request, resume_dir)
    announce = f"seed {request.seed}" if seed is None else None
    delivery = Delivery(output, preview, playing, receipt, sidecar, credentials, resume_dir)
    told = make(request, delivery, device, force=force, announce=announce)
    typer.echo(json.dumps(told) if as_json else told["file"] or "", err=bool(play))


def critic_for(request: "Request", bounds: Mapping[str, float] | None = None) -> "Critic | None":
    """Who judges the windows of a request, if it asks for retakes; by bounds of its own, if given."""
    from skyloom.evaluate.window_quality import load_critic

    return None if request.retakes is None else load_critic(bounds)


def with_seed(request: "Request", resume: Path | None) -> "Request":
    """A request with a seed: the one of the video that is gone on with, if there is one, else a drawn one."""
    from skyloom.generate.resume import read_asked

    begun = (
        None
        if resume is None or request.seed is not None or not request.samples
        else read_asked(resume)
    )
    return request.with_fields({"seed": begun["request"]["seed"]}) if begun else request.with_seed()


@dataclass(frozen=True)
class Delivery:
    """Where a video and what is said of it go."""

    output: Path | None
    preview: Path | None
    play: bool
    receipt: bool
    sidecar: bool
    credentials: bool
    resume: Path | None

    def check(self, prompt: str) -> None:
        """Raise, before any work, for what cannot be written or signed."""
        from skyloom.generate.export import check_ready
        from skyloom.media.write import PICTURE_SUFFIXES, check_target

        if self.preview is not None:
            check_target(self.preview, PICTURE_SUFFIXES)
        check_target(self.output or free_name(prompt, Path()))
        check_ready(credentials=self.credentials)


def make(
    request: "Request",
    delivery: Delivery,
    device: str | None,
    *,
    force: bool,
    announce: str | None,
    name: str | None = None,
) -> dict[str, Any]:
    """Check everything, then make the video; `announce` is said once it is sure that there will be one.

    Without an output the file is named after `name`, or the prompt.
    """
    from skyloom.generate.estimate import (
        check_capacity,
        check_states,
        estimate,
        free_memory,
        read_history,
        recorded,
        work_of,
    )
    from skyloom.generate.pipeline import load
    from skyloom.generate.resume import clear
    from skyloom.media.write import write_sidecar

    name = name or request.prompt
    delivery.check(name)
    since = time.perf_counter()
    pipeline = load(request.model or "diorama", device=device)
    plan = pipeline.plan(request)
    dtype = str(pipeline.dtype).removeprefix("torch.")
    work = work_of(
        plan,
        pipeline.info,
        pipeline.dit.config,
        pipeline.vae.config.scale,
        pipeline.device.type,
        dtype,
    )
    if not force:
        free_disk = shutil.disk_usage((delivery.output or Path()).absolute().parent).free
        check_capacity(
            estimate(work, read_history()), free_disk=free_disk, free_memory=free_memory()
        )
        if delivery.resume is not None:
            check_states(
                plan,
                pipeline.vae.config.scale,
                pipeline.vae.config.latent_channels,
                delivery.resume,
            )
    steps = pipeline.stream(plan, collect=False, resume=delivery.resume, critic=critic_for(request))
    if announce:
        typer.echo(announce, err=True)
    target = delivery.output or (None if delivery.play else free_name(name, Path()))
    if (
        request.retakes is None and request.edit is None
    ):  # takes thrown away, and frames kept, would teach it wrong
        steps = recorded(steps, work, since=since)
    receipt, frames = _deliver(steps, plan, target, delivery)
    if delivery.sidecar and target is not None:
        write_sidecar(target, receipt)
    if delivery.resume is not None:
        clear(delivery.resume)
    return {"file": str(target) if target else None, "seconds": frames / float(plan.fps), **receipt}


def _deliver(
    steps: "Iterator[Step]", plan: "Plan", target: Path | None, delivery: Delivery
) -> tuple[dict[str, object], int]:
    """Write a video while it is made, to a file, to a player at standard output, or to both."""
    from skyloom.core.errors import SafetyError
    from skyloom.generate.export import publish
    from skyloom.media.write import open_pipe, open_video
    from skyloom.safety.provenance import Glimpses

    glimpses = Glimpses(plan.fps)
    with ExitStack() as stack:
        writer = None if target is None else stack.enter_context(open_video(target, plan.fps))
        pipe = (
            stack.enter_context(open_pipe(sys.stdout.buffer, plan.fps)) if delivery.play else None
        )
        if writer is not None:
            _add_sound(plan, writer)
        takers = [taker.append for taker in (writer, pipe, glimpses) if taker is not None]
        try:
            receipt, frames = show_progress(steps, delivery.preview, takers)
        except SafetyError:
            if delivery.preview is not None:  # of what may not be seen
                delivery.preview.unlink(missing_ok=True)
            raise
        if writer is not None and delivery.receipt:
            writer.receipt = receipt
    if target is not None:
        publish(
            target,
            receipt,
            looks=glimpses.looks,
            credentials=delivery.credentials,
            told=delivery.receipt,
        )
    return receipt, frames


def _add_sound(plan: "Plan", writer: "VideoWriter") -> None:
    """The sound of an edit's sources goes where their time goes by, as far as the file can hold it."""
    if plan.timeline is None or plan.footage is None:
        return
    lost = False
    for at, clip in plan.timeline.sound_clips:
        source = plan.footage.sources[clip.source]
        if source.sound is not None:
            lost |= not writer.add_sound(
                source.sound, source.sound_packets(clip.start, clip.stop), at
            )
    if lost:
        typer.echo("Not all sound could be kept: only .mp4 holds it, and of one kind.", err=True)


def show_progress(
    steps: "Iterator[Step]",
    preview: Path | None,
    takers: "Sequence[Callable[[UInt8[Tensor, 't h w c']], None]]",
) -> tuple[dict[str, object], int]:
    """Hand out frames as they are done, behind a progress bar with phase, step and time left.

    The latest preview goes to a file. Returns the receipt and how many frames there were.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from skyloom.media.write import write_picture

    console, frames = Console(stderr=True), 0
    receipt: dict[str, object] | None = None
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}
        for step in steps:
            if step.phase not in tasks:
                tasks[step.phase] = bar.add_task(step.phase, total=step.total)
            bar.update(tasks[step.phase], completed=step.index)
            if step.notice:
                console.print(step.notice, markup=False, highlight=False)
            if preview is not None and (picture := step.preview()) is not None:
                write_picture(picture, preview)
            if step.frames is not None and len(step.frames):
                frames += len(step.frames)
                for take in takers:
                    take(step.frames)
            receipt = step.receipt or receipt
    assert receipt is not None, "a stream ends with a receipt"
    return receipt, frames


def free_name(prompt: str, folder: Path) -> Path:
    """A file name made of the prompt's words that is not taken yet."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = (
        re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:_SLUG_LENGTH].strip("-") or "video"
    )
    path, number = folder / f"{words}.mp4", 1
    while path.exists():
        number += 1
        path = folder / f"{words}-{number}.mp4"
    return path
