"""Render queued jobs with a Pipeline: fetch inputs, make the video, thumbnail and spritesheet.

Requests name media by storage reference ("asset:<sha256>.png"); nothing else is opened. Models
stay loaded between jobs (pipelines.py). Paths are relative to the worker's folder, so that a run
resumed on another host has an equal request.
"""

import hashlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from skyloom.core.errors import RequestError
from skyloom.evaluate.window_quality import load_critic
from skyloom.generate.export import ExportOptions, check_ready, export_steps, sources_of
from skyloom.generate.latent_store import clear
from skyloom.generate.pipeline import Pipeline, Step
from skyloom.generate.plan import Plan
from skyloom.generate.request import Request
from skyloom.models.registry import DEFAULT_MODEL
from skyloom.safety.credentials import generation_assertion, sign
from skyloom.safety.signer import find_signer
from skyloom.serve.queue.job import Job
from skyloom.serve.redaction import clean_receipt
from skyloom.serve.storage import Asset, AssetStorage
from skyloom.serve.workers.pipelines import PipelineCache
from skyloom.serve.workers.worker import STATE, Progress

MEDIA_FIELDS = ("image", "video", "videos", "mask")
_TEXT_PERCENT = 1  # share of each phase in a job's progress
_DENOISE_PERCENT = 90
_DECODE_PERCENT = 8
_SAVE_SECONDS = 2.0  # work that a crash of this host may lose
_SHEET_FRAMES = 20
_SHEET_COLUMNS = 5
_MAX_CELL_WIDTH = 160  # pixels


class PipelineRenderer:
    """Render jobs with the pipelines of one device; by default none is ever evicted."""

    def __init__(
        self,
        storage: AssetStorage,
        device: str | None = None,
        pipelines: PipelineCache | None = None,
    ) -> None:
        self._storage = storage
        self._pipelines = pipelines or PipelineCache(device, {})

    def __call__(self, job: Job, folder: Path, *, output: Path) -> Generator[Progress]:
        """Yield the steps of a job; frames are encoded as they arrive, in constant memory."""
        pipeline, plan = self._plan(job, folder)
        target = output / "video.mp4"
        sampler = _FrameSampler(plan.shape.frames)
        receipt: Mapping[str, Any] | None = None
        check_ready()
        yield Progress(_TEXT_PERCENT, "text")
        done = {"denoise": 0.0, "decode": 0.0}
        options = ExportOptions(
            annotate=partial(_with_characters, described=job.metadata.get("described")),
            redact=partial(clean_receipt, request=job.request),
        )
        steps = self._stream(pipeline, plan, folder / STATE)
        for step in export_steps(steps, plan, target, options):
            if step.frames is not None and len(step.frames):
                sampler.append(step.frames)
            receipt = step.receipt or receipt
            if step.phase in done:
                done[step.phase] = step.index / step.total
                yield Progress(_percent(done["denoise"], done["decode"]), step.phase)
        assert receipt is not None, "the last step of a stream has the receipt"
        pictures = sampler.write(output)
        for picture in pictures.values():
            sign(picture, generation_assertion(receipt), find_signer(), sources=sources_of(receipt))
        yield Progress(_percent(1.0, 1.0), "decode", {"video": target, **pictures}, receipt)

    def _plan(self, job: Job, folder: Path) -> tuple[Pipeline, Plan]:
        """Load the model and plan the job's request with local input files and a fixed seed."""
        inputs = Path(os.path.relpath(folder)) / "inputs"
        request = Request.from_dict(self._fetch_inputs(job.request, inputs))
        if request.seed is None and request.needs_model:
            request = request.with_fields({"seed": seed_of(job.id)})
        # a job that has failed here before gets the whole memory
        pipeline = self._pipelines.get(request.model or DEFAULT_MODEL, alone=job.attempts > 0)
        return pipeline, pipeline.plan(request.with_fields({"model": pipeline.info.name}))

    def _stream(self, pipeline: Pipeline, plan: Plan, state: Path) -> Iterator[Step]:
        """The pipeline's steps, resumed from `state`; a state that does not fit is deleted."""
        critic = None if plan.request.retakes is None else load_critic(pipeline.info)
        stream = partial(
            pipeline.stream,
            plan,
            collect=False,
            resume=state,
            save_every=_SAVE_SECONDS,
            critic=critic,
            check_consent=False,
        )
        try:
            return stream()
        except RequestError:
            clear(state)  # written by another version or for another device
            return stream()

    def _fetch_inputs(self, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Replace storage references by local files. Raises RequestError for any other path."""
        return {name: self._fetch_input(name, value, folder) for name, value in values.items()}

    def _fetch_input(self, name: str, value: Any, folder: Path) -> Any:
        if isinstance(value, Mapping):
            return self._fetch_inputs(value, folder)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [self._fetch_input(name, item, folder) for item in value]
        if name not in MEDIA_FIELDS or not isinstance(value, str):
            return value
        asset = Asset.parse(value)
        target = folder / f"{asset.sha256}.{asset.suffix}"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._storage.fetch(asset, target)
        return str(target)


class _FrameSampler:
    """Collect evenly spaced, downscaled frames of a stream for its thumbnail and spritesheet."""

    def __init__(self, frames: int) -> None:
        count = min(_SHEET_FRAMES, frames)
        last = max(1, count - 1)
        self._indices = {round(index * (frames - 1) / last) for index in range(count)}
        self._first: UInt8[Tensor, "h w c"] | None = None
        self._cells: list[Image.Image] = []
        self._count = 0

    def append(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Take the next frames of the stream."""
        for frame in frames.cpu():
            if self._count in self._indices or not self._cells:
                picture = Image.fromarray(frame.numpy())
                width = min(_MAX_CELL_WIDTH, picture.width)
                height = max(1, round(width * picture.height / picture.width))
                self._cells.append(picture.resize((width, height), Image.Resampling.LANCZOS))
            if self._first is None:
                self._first = frame.clone()
            self._count += 1

    def write(self, folder: Path) -> dict[str, Path]:
        """Write thumbnail.webp (first frame) and spritesheet.jpg (rows of five)."""
        assert self._first is not None, "a video has at least one frame"
        thumbnail = folder / "thumbnail.webp"
        Image.fromarray(self._first.numpy()).save(thumbnail, "WEBP", quality=90)
        width, height = self._cells[0].size
        rows = -(-len(self._cells) // _SHEET_COLUMNS)
        sheet = Image.new("RGB", (width * _SHEET_COLUMNS, height * rows))
        for index, cell in enumerate(self._cells):
            row, column = divmod(index, _SHEET_COLUMNS)
            sheet.paste(cell, (column * width, row * height))
        spritesheet = folder / "spritesheet.jpg"
        sheet.save(spritesheet, "JPEG", quality=88)
        return {"thumbnail": thumbnail, "spritesheet": spritesheet}


def seed_of(job_id: str) -> int:
    """Seed of a job without one, derived from its id: every attempt makes the same video."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:4]) // 2


def _percent(denoised: float, decoded: float) -> int:
    """Progress of a job from the finished fractions of its phases."""
    return _TEXT_PERCENT + int(_DENOISE_PERCENT * denoised + _DECODE_PERCENT * decoded)


def _with_characters(
    receipt: Mapping[str, Any], described: Mapping[str, str] | None
) -> Mapping[str, Any]:
    """The receipt with a note of the descriptions that replaced character names in the prompt."""
    if not described:
        return receipt
    return {**receipt, "notes": {**receipt.get("notes", {}), "characters": described}}
