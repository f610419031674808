"""Canvas: a latent video with known cells and cells to generate.

Text to video, image to video, keyframes, extend, loop, inpaint and retake differ only in the canvas
they start from. A fully known latent frame enters the model clean, at sigma 0 (diffusion forcing,
Chen et al. 2024, arXiv 2407.01392). A known cell in a frame that is being generated is noised to
that frame's level (RePaint, Lugmayr et al. 2022, arXiv 2201.09865) and ends equal to its source bit
for bit.
"""

from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from skyloom.core.errors import RequestError
from skyloom.core.types import LatentShape, ScaleFactors
from skyloom.diffusion.flow import add_noise


@dataclass(frozen=True, eq=False)
class Canvas:
    """A latent, and a mask that is True for cells to generate.

    latent: known cells; elsewhere the source of an edit with strength below 1.
    context_sigma: noise level at which known frames enter the model (against drift).
    prompts: (first latent frame, prompt) pairs in rising order.
    strength: noise level, per latent frame, above which its source is kept (SDEdit, Meng et al.
        2021, arXiv 2108.01073); None starts every generated frame from pure noise.
    """

    latent: Float[Tensor, "c t h w"]
    denoise_mask: Bool[Tensor, "t h w"]
    context_sigma: float = 0.0
    prompts: tuple[tuple[int, str], ...] = ()
    strength: Float[Tensor, " t"] | None = None

    def __post_init__(self) -> None:
        if self.latent.shape[1:] != self.denoise_mask.shape:
            latent = tuple(self.latent.shape[1:])
            mask = tuple(self.denoise_mask.shape)
            raise RequestError(f"denoise_mask must have shape {latent}, got {mask}.")

    @classmethod
    def text_to_video(cls, channels: int, shape: LatentShape) -> "Canvas":
        """Return a canvas without known cells."""
        size = (shape.frames, shape.height, shape.width)
        return cls(torch.zeros(channels, *size), torch.ones(size, dtype=torch.bool))

    def set_known(self, start: int, latent: Float[Tensor, "c2 k h2 w2"]) -> "Canvas":
        """Return a canvas whose latent frames from `start` on are `latent`.

        A negative `start` counts from the end.
        """
        frames = self.frames
        count = latent.shape[1]
        first = start + frames if start < 0 else start
        channels, _, height, width = latent.shape
        if (channels, height, width) != (self.latent.shape[0], *self.latent.shape[2:]):
            expected = (self.latent.shape[0], count, *self.latent.shape[2:])
            raise RequestError(f"latent must have shape {expected}, got {tuple(latent.shape)}.")
        if first < 0 or first + count > frames:
            raise RequestError(
                f"Latent frames must be within 0 to {frames - 1}, "
                f"got {first} to {first + count - 1}."
            )
        source = self.latent.to(latent.dtype, copy=True)
        mask = self.denoise_mask.clone()
        source[:, first : first + count] = latent.to(source.device)
        mask[first : first + count] = False
        return replace(self, latent=source, denoise_mask=mask)

    @property
    def frames(self) -> int:
        """Number of latent frames."""
        return self.latent.shape[1]

    def window(self, start: int, stop: int) -> "Canvas":
        """Return the canvas of latent frames `start` to `stop` (exclusive)."""
        held = tuple(pair for pair in self.prompts if start < pair[0] < stop)
        prompt = self.prompt_at(start)
        opening = () if prompt is None else ((0, prompt),)
        prompts = (*opening, *((first - start, text) for first, text in held))
        latent = self.latent[:, start:stop]
        mask = self.denoise_mask[start:stop]
        strength = None if self.strength is None else self.strength[start:stop]
        return replace(self, latent=latent, denoise_mask=mask, prompts=prompts, strength=strength)

    def prompt_at(self, frame: int) -> str | None:
        """Return the prompt in force at a latent frame."""
        held = [prompt for first, prompt in self.prompts if first <= frame]
        return held[-1] if held else None

    def to(self, device: torch.device | str) -> "Canvas":
        """Move the tensors to a device."""
        strength = None if self.strength is None else self.strength.to(device)
        return replace(
            self,
            latent=self.latent.to(device),
            denoise_mask=self.denoise_mask.to(device),
            strength=strength,
        )

    def frame_sigma(self, sigma: float) -> Float[Tensor, " t"]:
        """Noise level of each latent frame while generated frames are at `sigma`."""
        generating = self.denoise_mask.any(dim=(1, 2))
        levels = torch.full((self.frames,), sigma, device=generating.device)
        if self.strength is not None:
            levels = levels.minimum(self.strength.to(levels))
        return levels.masked_fill(~generating, min(sigma, self.context_sigma))

    def at_sigma(
        self, noise: Float[Tensor, "b c t h w"], sigma: float
    ) -> Float[Tensor, "b c t h w"]:
        """Mix `noise` into the source, each frame at its level: the start of sampling."""
        levels = repeat(self.frame_sigma(sigma), "t -> b t", b=len(noise)).to(noise)
        source = repeat(self.latent, "c t h w -> b c t h w", b=len(noise)).to(noise)
        clean = rearrange(levels == 0, "b t -> b 1 t 1 1")
        return torch.where(clean, source, add_noise(source, noise, levels))

    def apply(
        self, latent: Float[Tensor, "b c t h w"], noise: Float[Tensor, "b c t h w"], sigma: float
    ) -> Float[Tensor, "b c t h w"]:
        """Restore the known cells of a latent at `sigma`; exactly the source at 0."""
        return torch.where(self.denoise_mask, latent, self.at_sigma(noise, sigma))


def to_latent_mask(mask: Bool[Tensor, "t h w"], scale: ScaleFactors) -> Bool[Tensor, "u y x"]:
    """Reduce a pixel mask to latent cells: a cell is True if any pixel that it covers is."""
    pixels = rearrange(mask, "t (y p) (x q) -> t y x (p q)", p=scale.space, q=scale.space)
    cells = pixels.any(dim=-1)
    frames = scale.latent_frames(len(mask))
    rest = rearrange(cells[1:], "(u k) y x -> u k y x", u=frames - 1, k=scale.time).any(dim=1)
    return torch.cat([cells[:1], rest])
