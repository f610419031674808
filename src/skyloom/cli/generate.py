"""`skyloom generate`: generate a video file from a sentence."""

import json
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyloom.cli import options
from skyloom.models.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from rich.progress import TaskID

    from skyloom.generate.estimate import Estimate
    from skyloom.generate.pipeline import Pipeline, Step
    from skyloom.generate.plan import Plan
    from skyloom.generate.request import Request
    from skyloom.generate.sampling import Critic
    from skyloom.models.registry import ModelInfo

_SLUG_LENGTH = 60


def generate(
    prompt: options.Prompt,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Output file (.mp4, .webm, .gif) (default: named after the prompt)",
        ),
    ] = None,
    seconds: options.Seconds = None,
    size: options.Size = None,
    fps: options.Fps = None,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    quality: options.Quality = None,
    schedule: options.Schedule = None,
    negative: options.Negative = "",
    image: options.Picture = None,
    consent: options.Consent = None,
    model: options.Model = DEFAULT_MODEL,
    lora: options.Loras = None,
    window_retries: options.WindowRetries = None,
    preview: Annotated[
        Path | None, typer.Option(help="Write the latest preview to this picture file.")
    ] = None,
    play: options.Play = None,
    receipt: options.Receipt = True,
    sidecar: options.Sidecar = False,
    credentials: options.Credentials = True,
    resume_dir: options.ResumeDir = None,
    force: options.Force = False,
    only_plan: options.OnlyPlan = False,
    as_json: options.AsJson = False,
    device: options.Device = None,
) -> None:
    """Generate a video from a sentence."""
    from skyloom.cli.plan import show
    from skyloom.generate.loras import Lora
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
        retakes=window_retries,
        loras=tuple(map(Lora.parse, lora or ())),
        schedule=schedule,
        consent=options.parse_consent(consent),
    )
    if only_plan:
        show(request, as_json, device)
        return
    delivery = Delivery(
        output=output,
        preview=preview,
        play=options.streams_to_stdout(play),
        receipt=receipt,
        sidecar=sidecar,
        credentials=credentials,
        resume=resume_dir,
    )
    make(request, delivery, device, force=force, as_json=as_json)


def critic_for(
    request: "Request", model: "ModelInfo", bounds: Mapping[str, float] | None = None
) -> "Critic | None":
    """The critic of a request with `retakes`; `bounds` replace the default ones."""
    from skyloom.evaluate.window_quality import load_critic

    return None if request.retakes is None else load_critic(model, bounds)


def with_seed(request: "Request", resume: Path | None) -> "Request":
    """A request with a seed: that of the checkpoints in `resume`, else a random one."""
    from skyloom.generate.latent_store import read_identity

    if resume is None or request.seed is not None or not request.needs_model:
        return request.with_seed()
    stored = read_identity(resume)
    if stored is None:
        return request.with_seed()
    return request.with_fields({"seed": stored["request"]["seed"]})


@dataclass(frozen=True)
class Delivery:
    """Outputs of a generation: files, standard output (`play`), receipt, signature, checkpoints."""

    output: Path | None
    preview: Path | None
    play: bool
    receipt: bool
    sidecar: bool
    credentials: bool
    resume: Path | None

    def check(self, name: str) -> None:
        """Raise an error before any work if a file cannot be written or signed."""
        from skyloom.generate.export import check_ready
        from skyloom.media.write import PICTURE_SUFFIXES, check_target

        if self.preview is not None:
            check_target(self.preview, PICTURE_SUFFIXES)
        check_target(self.output or free_name(name, Path()))
        check_ready(credentials=self.credentials)


def make(
    request: "Request",
    delivery: Delivery,
    device: str | None,
    *,
    force: bool,
    as_json: bool,
    name: str | None = None,
) -> dict[str, Any]:
    """Check a request, generate its video, write it, and print the receipt or the file's name.

    A seed that is drawn is printed once all checks have passed. Without an output, the file is
    named after `name`, or the prompt. Returns the receipt with the file and its length in seconds.
    """
    drawn = request.seed is None and request.needs_model
    request = with_seed(request, delivery.resume)
    announce = f"seed {request.seed}" if drawn else None
    result = _make(request, delivery, device, force=force, announce=announce, name=name)
    typer.echo(json.dumps(result) if as_json else result["file"] or "", err=delivery.play)
    return result


def _make(
    request: "Request",
    delivery: Delivery,
    device: str | None,
    *,
    force: bool,
    announce: str | None,
    name: str | None,
) -> dict[str, Any]:
    """Generate and write the video of a request with a seed; return its receipt and length."""
    from skyloom.generate.estimate import estimate, read_history, record_steps, workload_of
    from skyloom.generate.latent_store import clear
    from skyloom.generate.pipeline import load
    from skyloom.media.write import write_sidecar
    from skyloom.models.base import find_loader

    name = name or request.prompt
    delivery.check(name)
    since = time.perf_counter()
    pipeline = load(request.model or DEFAULT_MODEL, device=device)
    plan = pipeline.plan(request)
    cost = find_loader(pipeline.info).read_network_cost(pipeline.info)
    workload = workload_of(
        plan,
        pipeline.info,
        cost,
        device=pipeline.device.type,
        dtype=str(pipeline.dtype).removeprefix("torch."),
    )
    if not force:
        expected = estimate(workload, read_history())
        if cost.memory is not None:  # the stream plans it
            expected = replace(expected, memory_bytes=0)
        _check_capacity(expected, delivery, pipeline, plan)
    critic = critic_for(request, pipeline.info)
    steps = pipeline.stream(
        plan, collect=False, resume=delivery.resume, critic=critic, check_memory=not force
    )
    if announce:
        typer.echo(announce, err=True)
    target = delivery.output or (None if delivery.play else free_name(name, Path()))
    # rejected takes and kept frames would distort the run history
    if request.retakes is None and request.edit is None:
        steps = record_steps(steps, workload, since=since)
    receipt, frames = _deliver(steps, plan, target, delivery)
    if delivery.sidecar and target is not None:
        write_sidecar(target, receipt)
    if delivery.resume is not None:
        clear(delivery.resume)
    return {"file": str(target) if target else None, "seconds": frames / float(plan.fps), **receipt}


def _check_capacity(
    expected: "Estimate", delivery: Delivery, pipeline: "Pipeline", plan: "Plan"
) -> None:
    """Raise CapacityError if memory or disk are too small."""
    from skyloom.generate.estimate import check_capacity, check_checkpoint_space, free_memory

    folder = (delivery.output or Path()).absolute().parent
    check_capacity(
        expected,
        free_disk=shutil.disk_usage(folder).free,
        free_memory=free_memory(),
    )
    if delivery.resume is not None:
        autoencoder = pipeline.autoencoder
        check_checkpoint_space(
            plan, autoencoder.scale, autoencoder.latent_channels, delivery.resume
        )


def _deliver(
    steps: "Iterator[Step]", plan: "Plan", target: Path | None, delivery: Delivery
) -> tuple[dict[str, object], int]:
    """Write frames to a file, a player or both while they are decoded, then sign the file.

    Returns the receipt and the number of frames.
    """
    from skyloom.core.errors import SafetyError
    from skyloom.generate.export import ExportOptions, export_steps

    options = ExportOptions(
        credentials=delivery.credentials,
        embed_receipt=delivery.receipt,
        player=sys.stdout.buffer if delivery.play else None,
    )
    try:
        return show_progress(export_steps(steps, plan, target, options), delivery.preview)
    except SafetyError:
        if delivery.preview is not None:  # it shows blocked content
            delivery.preview.unlink(missing_ok=True)
        raise


def show_progress(steps: "Iterator[Step]", preview: Path | None) -> tuple[dict[str, object], int]:
    """Consume a stream and show a progress bar with phase, step and time left.

    The latest preview is written to `preview`. Returns the receipt and the number of frames.
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

    console = Console(stderr=True)
    frames = 0
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
            receipt = step.receipt or receipt
    assert receipt is not None, "a stream ends with a receipt"
    return receipt, frames


def free_name(prompt: str, folder: Path) -> Path:
    """An unused file name made of the prompt's words."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = (
        re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:_SLUG_LENGTH].strip("-") or "video"
    )
    path = folder / f"{words}.mp4"
    number = 1
    while path.exists():
        number += 1
        path = folder / f"{words}-{number}.mp4"
    return path
