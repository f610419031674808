"""Jobs to files by a Pipeline: inputs from the storage, the video, its thumbnail and its spritesheet.

A request's media are named by reference ("asset:<sha256>.png"); nothing else is opened. The model stays loaded from job
to job. Paths are relative to the worker's folder, so that a run that another host goes on with asks for the same.
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
from skyloom.generate.export import check_ready, sign_and_register, sources_of
from skyloom.generate.pipeline import Pipeline, Step, load
from skyloom.generate.plan import Plan
from skyloom.generate.request import Request
from skyloom.generate.resume import clear
from skyloom.media.write import VideoWriter, open_video
from skyloom.safety.credentials import generation_of, sign
from skyloom.safety.provenance import Glimpses
from skyloom.safety.signer import find_signer
from skyloom.serve.queue.job import Job
from skyloom.serve.redaction import clean_receipt
from skyloom.serve.storage.folder import Asset, Storage
from skyloom.serve.workers.worker import STATE, Progress

MEDIA = ("image", "video", "videos", "mask")
_TEXT, _DENOISE, _DECODE = 1, 90, 8  # percent of a video that its phases count for
_SAVE_EVERY = 2.0  # seconds of work that a crash of this machine may cost
_MOMENTS, _COLUMNS, _CELL = (
    20,
    5,
    160,
)  # of a spritesheet: frames, frames in a row, width of one in pixels at most


class PipelineRenderer:
    """Renders jobs by Pipelines on one device."""

    def __init__(self, storage: Storage, device: str | None = None) -> None:
        self._storage, self._device = storage, device
        self._loaded: tuple[str, Pipeline] | None = None

    def __call__(self, job: Job, folder: Path, *, output: Path) -> Generator[Progress]:
        """The steps of a job's video; frames are written as they are done, memory does not grow with the length."""
        values = self._with_inputs(dict(job.request), Path(os.path.relpath(folder)) / "inputs")
        asked = Request.from_dict(values)
        if asked.seed is None and asked.samples:
            asked = asked.with_fields({"seed": seed_of(job.id)})
        pipeline = self._pipeline(asked.model or "diorama")
        asked = asked.with_fields({"model": pipeline.info.name})
        plan = pipeline.plan(asked)
        target, sampler = output / "video.mp4", _Sampler(plan.shape.frames)
        receipt: Mapping[str, Any] | None = None
        glimpses = Glimpses(plan.fps)
        check_ready()
        yield Progress(_TEXT, "text")
        with open_video(target, plan.fps) as writer:
            _add_sound(plan, writer)
            done = {"denoise": 0.0, "decode": 0.0}
            for step in self._stream(pipeline, plan, folder / STATE):
                if step.frames is not None and len(step.frames):
                    writer.append(step.frames)
                    sampler.take(step.frames)
                    glimpses.append(step.frames)
                receipt = step.receipt or receipt
                if step.phase in done:
                    done[step.phase] = step.index / step.total
                    percent = _TEXT + int(_DENOISE * done["denoise"] + _DECODE * done["decode"])
                    yield Progress(percent, step.phase)
            assert receipt is not None, "a stream ends with a receipt"
            receipt = _with_cast(receipt, job.extra.get("described"))
            writer.receipt = clean_receipt(receipt, job.request)
        pictures = sampler.write(output)
        sign_and_register(target, receipt, perceptual_hashes=glimpses.looks)
        for picture in pictures.values():
            sign(picture, generation_of(receipt), find_signer(), sources=sources_of(receipt))
        files = {"video": target, **pictures}
        yield Progress(_TEXT + _DENOISE + _DECODE, "decode", files, receipt)

    def _stream(self, pipeline: Pipeline, plan: Plan, state: Path) -> Iterator[Step]:
        """The pipeline's steps, from where the state says; state that belongs to something else is left behind."""
        critic = None if plan.request.retakes is None else load_critic()
        go_on = partial(
            pipeline.stream,
            plan,
            collect=False,
            resume=state,
            save_every=_SAVE_EVERY,
            critic=critic,
        )
        try:
            return go_on()
        except RequestError:
            clear(state)  # of another version, or another device: it cannot be gone on with
            return go_on()

    def _pipeline(self, name: str) -> Pipeline:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # the old model goes before the new one comes
            self._loaded = (name, load(name, device=self._device))
        return self._loaded[1]

    def _with_inputs(self, values: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The same request with local files for references. Raises RequestError for anything else that names media."""
        for name, value in values.items():
            if isinstance(value, Mapping):
                values[name] = self._with_inputs(dict(value), folder)
            elif isinstance(value, Sequence) and not isinstance(value, str):
                values[name] = [self._input(name, one, folder) for one in value]
            else:
                values[name] = self._input(name, value, folder)
        return values

    def _input(self, name: str, value: Any, folder: Path) -> Any:
        if isinstance(value, Mapping):
            return self._with_inputs(dict(value), folder)
        if name not in MEDIA or not isinstance(value, str):
            return value
        asset = Asset.parse(value)
        target = folder / f"{asset.sha256}.{asset.suffix}"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._storage.fetch(asset, target)
        return str(target)


class _Sampler:
    """Keeps the frames of a video's thumbnail and spritesheet while it is made: evenly spread, in small."""

    def __init__(self, frames: int) -> None:
        moments = min(_MOMENTS, frames)
        self._wanted = {
            round(index * (frames - 1) / max(1, moments - 1)) for index in range(moments)
        }
        self._first: UInt8[Tensor, "h w c"] | None = None
        self._cells: list[Image.Image] = []
        self._seen = 0

    def take(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Look at the next frames."""
        for frame in frames.cpu():
            if self._seen in self._wanted or not self._cells:
                picture = Image.fromarray(frame.numpy())
                width = min(_CELL, picture.width)
                height = max(1, round(width * picture.height / picture.width))
                self._cells.append(picture.resize((width, height), Image.Resampling.LANCZOS))
                self._first = self._first if self._first is not None else frame.clone()
            self._seen += 1

    def write(self, folder: Path) -> dict[str, Path]:
        """The first frame as a webp, the moments as a jpg with rows of five."""
        assert self._first is not None, "a video has a frame"
        thumbnail, sheet = folder / "thumbnail.webp", folder / "spritesheet.jpg"
        Image.fromarray(self._first.numpy()).save(thumbnail, "WEBP", quality=90)
        width, height = self._cells[0].size
        whole = Image.new("RGB", (width * _COLUMNS, height * -(-len(self._cells) // _COLUMNS)))
        for index, cell in enumerate(self._cells):
            whole.paste(cell, (index % _COLUMNS * width, index // _COLUMNS * height))
        whole.save(sheet, "JPEG", quality=88)
        return {"thumbnail": thumbnail, "spritesheet": sheet}


def _with_cast(
    receipt: Mapping[str, Any], described: Mapping[str, str] | None
) -> Mapping[str, Any]:
    """A receipt that says what was put into the prompt for which character."""
    return (
        {**receipt, "notes": {**receipt.get("notes", {}), "characters": described}}
        if described
        else receipt
    )


def _add_sound(plan: Plan, writer: VideoWriter) -> None:
    """The sound of an edit's sources, as far as an mp4 can hold it."""
    if plan.timeline is not None and plan.edit_sources is not None:
        for at, clip in plan.timeline.sound_clips:
            source = plan.edit_sources.sources[clip.source]
            if source.sound is not None:
                writer.add_sound(source.sound, source.sound_packets(clip.start, clip.stop), at)


def seed_of(id: str) -> int:
    """The seed of a job that named none: always the same, so that every attempt makes the same video."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:4]) // 2
