# pyright: basic
"""Output stage: turn rendered frames into the steps of a stream."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.audio import Audio
from skyloom.core.config import to_table
from skyloom.generate.plan import Plan
from skyloom.generate.receipt import FramesHash, Receipt
from skyloom.generate.renderer import RenderedFrames
from skyloom.media.frames import to_frames
from skyloom.media.seam_metric import SeamMetric
from skyloom.media.video import Video
from skyloom.models.base import Autoencoder, Previewer
from skyloom.safety.frame_moderation import StreamModerator
from skyloom.safety.watermark import SpreadSpectrumWatermarker, watermark_id_of_receipt


@dataclass(frozen=True, eq=False)
class Step:
    """A finished unit of work: `index` (from 1) of `total` in phase "text", "denoise" or "decode".

    "decode" steps count frames and carry the next `frames` and, of a family with sound, the next
    `audio`, which is never behind the frames; the last step carries the `receipt`
    and, if frames are collected, the whole `video`. `notice` is a warning for the user.
    """

    phase: str
    index: int
    total: int
    latent: Float[Tensor, "c t h w"] | None = field(default=None, repr=False)
    frames: UInt8[Tensor, "t h w c"] | None = field(default=None, repr=False)
    audio: Audio | None = field(default=None, repr=False)
    receipt: dict[str, object] | None = field(default=None, repr=False)
    video: Video | None = field(default=None, repr=False)
    notice: str | None = None
    autoencoder: Autoencoder | None = field(default=None, repr=False)

    @torch.no_grad()
    def preview(self) -> UInt8[Tensor, "h w c"] | None:
        """Make a picture of the middle latent frame of a "denoise" step.

        The autoencoder's own preview if it has one, which may be None, else decoded.
        """
        if self.latent is None or self.autoencoder is None:
            return None
        middle = self.latent.shape[1] // 2
        if isinstance(self.autoencoder, Previewer):
            pixels = self.autoencoder.preview(self.latent[:, middle])
            return None if pixels is None else to_frames(pixels[:, None])[0]
        cell = self.latent[None, :, middle : middle + 1].to(self.autoencoder.device)
        return to_frames(self.autoencoder.decode(cell)[0])[0]


class OutputStage:
    """Drops frames for a lower rate, watermarks generated ones, moderates and hashes the result.

    With `collect`, frames are kept for the video of the last step.
    """

    def __init__(
        self, plan: Plan, receipt: Receipt, moderator: StreamModerator | None, *, collect: bool
    ) -> None:
        self._plan = plan
        self._receipt = receipt
        self._moderator = moderator
        self._hash = FramesHash(plan.fps)
        self._watermarker = SpreadSpectrumWatermarker(watermark_id_of_receipt(receipt.to_dict()))
        self._collected: list[Tensor] | None = [] if collect else None
        self._frames = 0
        self._waiting_sound: list[Audio] = []
        self._collected_sound: list[Audio] = []
        self._sound_hash = hashlib.sha256()
        self._sound_format: tuple[int, int] | None = None
        self._final_notes: list[Callable[[], Mapping[str, Any]]] = []
        self._seams = SeamMetric(plan.timeline.seams) if plan.request.edit is not None else None

    def add_final_notes(self, notes: Callable[[], Mapping[str, Any]]) -> None:
        """Add the notes that a function returns at the end to the receipt."""
        self._final_notes.append(notes)

    def add_sound(self, audio: Audio) -> None:
        """Add the sound of the next frames; the next "decode" step carries it."""
        self._sound_hash.update(audio.samples.numpy().tobytes())
        self._sound_format = (audio.rate, audio.channels)
        self._waiting_sound.append(audio)
        if self._collected is not None:
            self._collected_sound.append(audio)

    def process(self, rendered: RenderedFrames) -> Step:
        """The "decode" step of the next frames. Raises SafetyError if moderation blocks them."""
        every = self._plan.keep_every
        output = rendered.frames[-self._frames % every :: every].clone()
        if rendered.generated:
            output = self._watermarker.mark(output, rendered.mask)
        if self._moderator is not None:
            self._moderator.check(output)
        self._frames += len(rendered.frames)
        self._hash.add(output)
        if self._seams is not None:
            self._seams.take(output)
        if self._collected is not None:
            self._collected.append(output)
        audio = Audio.concatenate(self._waiting_sound) if self._waiting_sound else None
        self._waiting_sound.clear()
        total = self._plan.shape.frames
        if self._frames < total:
            return Step("decode", self._frames, total, frames=output, audio=audio)
        return replace(self._last_step(output), audio=audio)

    def _last_step(self, output: UInt8[Tensor, "t h w c"]) -> Step:
        notes = {
            **self._receipt.notes,
            **self._schedule_notes(),
            **self._seam_notes(),
            **self._sound_notes(),
            **{key: value for notes in self._final_notes for key, value in notes().items()},
        }
        receipt = replace(self._receipt, frames=self._hash.digest(), notes=notes).to_dict()
        video = None
        if self._collected is not None:
            sound = Audio.concatenate(self._collected_sound) if self._collected_sound else None
            video = Video(torch.cat(self._collected), self._plan.fps, receipt, sound)
        total = self._plan.shape.frames
        return Step("decode", total, total, frames=output, receipt=receipt, video=video)

    def _schedule_notes(self) -> dict[str, Any]:
        """Return solver, spacing of the levels and shift, if anything was sampled."""
        if not self._plan.runs:
            return {}
        return {"schedule": to_table(self._plan.schedule)}

    def _sound_notes(self) -> dict[str, Any]:
        """Return the format and the digest of the generated sound."""
        if self._sound_format is None:
            return {}
        rate, channels = self._sound_format
        digest = self._sound_hash.hexdigest()
        return {"sound": {"sha256": digest, "rate": rate, "channels": channels}}

    def _seam_notes(self) -> dict[str, Any]:
        """Return the change at each seam over the ordinary change; also at the end of a loop."""
        if self._seams is None:
            return {}
        notes: dict[str, Any] = {
            "seams": {str(seam): round(ratio, 3) for seam, ratio in self._seams.ratios().items()}
        }
        if self._plan.timeline.loops:
            notes["closure"] = round(self._seams.closure(), 3)
        return notes
