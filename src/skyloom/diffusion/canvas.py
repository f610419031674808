"""Canvas: a video in the making, its known parts and the parts to be made.

Text to video, image to video, keyframes, extend, loop, inpaint and retake differ only in the canvas they
start from. A latent frame with nothing to make enters the model clean, at sigma 0 (diffusion forcing, Chen
et al. 2024, arXiv 2407.01392). A known cell inside a frame that is being made rides at that frame's level
on its own noise (Lugmayr et al. 2022, arXiv 2201.09865) and lands on its source bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from skyloom.core.errors import RequestError
from skyloom.core.types import LatentShape, ScaleFactors
from skyloom.diffusion.flow import add_noise


@dataclass(frozen=True, eq=False)
class Canvas:
    """What is known (`latent` where `denoise_mask` is False) and what is to be made (where it is True).

    Where cells are made, `latent` is what an edit of strength below 1 starts from. Known frames carry noise
    up to `context_sigma` on their way through the model, which long rollouts use against drift. `prompts`
    are (first latent frame, prompt) pairs in rising order, for videos whose prompt changes. `strength` says, per
    latent frame, how far it may move from its source: it is noised no further than that (SDEdit: Meng et al. 2021,
    arXiv 2108.01073); without it, every frame that is made starts from noise alone.
    """

    latent: Float[Tensor, "c t h w"]
    denoise_mask: Bool[Tensor, "t h w"]
    context_sigma: float = 0.0
    prompts: tuple[tuple[int, str], ...] = ()
    strength: Float[Tensor, " t"] | None = None

    def __post_init__(self) -> None:
        if self.latent.shape[1:] != self.denoise_mask.shape:
            latent, mask = tuple(self.latent.shape[1:]), tuple(self.denoise_mask.shape)
            raise RequestError(f"A mask of {mask} does not cover a latent of {latent}.")

    @classmethod
    def text_to_video(cls, channels: int, shape: LatentShape) -> "Canvas":
        """Nothing is known."""
        size = (shape.frames, shape.height, shape.width)
        return cls(torch.zeros(channels, *size), torch.ones(size, dtype=torch.bool))

    @classmethod
    def image_to_video(cls, first: Float[Tensor, "c 1 h w"], frames: int) -> "Canvas":
        """The first of `frames` latent frames is known."""
        return cls.keyframes({0: first}, frames)

    @classmethod
    def keyframes(cls, known: Mapping[int, Float[Tensor, "c k h w"]], frames: int) -> "Canvas":
        """Runs of latent frames are known from the given positions on; negative ones count from the end."""
        if not known:
            raise RequestError("Keyframes need at least one picture.")
        channels, _, height, width = next(iter(known.values())).shape
        canvas = cls.text_to_video(channels, LatentShape(frames, height, width))
        for start, latent in known.items():
            canvas = canvas.keep(start, latent)
        return canvas

    def keep(self, start: int, latent: Float[Tensor, "c k h w"]) -> "Canvas":
        """A canvas whose frames from `start` on are known to be `latent`."""
        frames, count = self.frames, latent.shape[1]
        first = start + frames if start < 0 else start
        channels, _, height, width = latent.shape
        if (channels, height, width) != (self.latent.shape[0], *self.latent.shape[2:]):
            raise RequestError(
                f"A latent of {tuple(latent.shape)} does not fit {tuple(self.latent.shape)}."
            )
        if first < 0 or first + count > frames:
            raise RequestError(
                f"Latent frames {start} to {start + count - 1} are outside a canvas of {frames}."
            )
        source, mask = self.latent.to(latent.dtype, copy=True), self.denoise_mask.clone()
        source[:, first : first + count] = latent.to(source.device)
        mask[first : first + count] = False
        return replace(self, latent=source, denoise_mask=mask)

    @property
    def frames(self) -> int:
        """Latent frames."""
        return self.latent.shape[1]

    def window(self, start: int, stop: int) -> "Canvas":
        """Latent frames `start` to `stop`, as a canvas of their own."""
        held = tuple(pair for pair in self.prompts if start < pair[0] < stop)
        prompt = self.prompt_at(start)
        opening = () if prompt is None else ((0, prompt),)
        prompts = (*opening, *((first - start, text) for first, text in held))
        latent, mask = self.latent[:, start:stop], self.denoise_mask[start:stop]
        strength = None if self.strength is None else self.strength[start:stop]
        return replace(self, latent=latent, denoise_mask=mask, prompts=prompts, strength=strength)

    def prompt_at(self, frame: int) -> str | None:
        """The prompt that holds at a latent frame."""
        held = [prompt for first, prompt in self.prompts if first <= frame]
        return held[-1] if held else None

    def to(self, device: torch.device | str) -> "Canvas":
        """The same canvas on another device."""
        strength = None if self.strength is None else self.strength.to(device)
        return replace(
            self,
            latent=self.latent.to(device),
            denoise_mask=self.denoise_mask.to(device),
            strength=strength,
        )

    def frame_sigma(self, sigma: float) -> Float[Tensor, " t"]:
        """The level at which each latent frame enters the model while made frames are at `sigma`."""
        making = reduce(self.denoise_mask, "t h w -> t", "any")
        levels = torch.full((self.frames,), sigma, device=making.device)
        if self.strength is not None:
            levels = levels.minimum(self.strength.to(levels))
        return levels.masked_fill(~making, min(sigma, self.context_sigma))

    def at_sigma(
        self, noise: Float[Tensor, "b c t h w"], sigma: float
    ) -> Float[Tensor, "b c t h w"]:
        """The source with `noise` mixed in, each frame at its level: where sampling starts."""
        levels = repeat(self.frame_sigma(sigma), "t -> b t", b=len(noise)).to(noise)
        source = repeat(self.latent, "c t h w -> b c t h w", b=len(noise)).to(noise)
        clean = rearrange(levels == 0, "b t -> b 1 t 1 1")
        return torch.where(clean, source, add_noise(source, noise, levels))

    def apply(
        self, latent: Float[Tensor, "b c t h w"], noise: Float[Tensor, "b c t h w"], sigma: float
    ) -> Float[Tensor, "b c t h w"]:
        """Put the known parts back into a latent at `sigma`; at 0 they equal the source bit for bit."""
        return torch.where(self.denoise_mask, latent, self.at_sigma(noise, sigma))


def to_latent_mask(mask: Bool[Tensor, "t h w"], scale: ScaleFactors) -> Bool[Tensor, "u y x"]:
    """A mask of pixels as a mask of latent cells: a cell is made if any pixel it covers is."""
    cells = reduce(mask, "t (y p) (x q) -> t y x", "any", p=scale.space, q=scale.space)
    frames = scale.latent_frames(len(mask))
    rest = reduce(cells[1:], "(u k) y x -> u y x", "any", u=frames - 1, k=scale.time)
    return torch.cat([cells[:1], rest])
