"""Previews by a linear map from latents to colours, fitted on what the decoder has made.

For autoencoders that take long to decode a picture. A cell's colour is nearly linear in its latent,
so the first decoded frames are enough for a fit by least squares. Its sums are kept in the cache
folder; before the first decoded frame there is no preview.
"""

from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from skyloom.core.files import write_atomically
from skyloom.core.paths import cache_folder
from skyloom.core.types import ScaleFactors

ENOUGH_FRAMES = 64  # latent frames; later ones are not read
_RIDGE = 1e-4  # added to the mean square of every channel


class PreviewMap:
    """Linear map from the channels of a latent cell to its mean colour.

    name: of the file in the cache folder; it must differ for autoencoders with other latents.
    """

    def __init__(self, name: str, channels: int, scale: ScaleFactors) -> None:
        self._name = name
        self._scale = scale
        shape = (channels + 1, channels + 4)  # products with the channels, with 1, with colours
        self._sums = torch.zeros(shape, dtype=torch.float64)
        self._frames = 0
        stored = self._load()
        sums = None if stored is None else stored.get("sums")
        if stored is not None and sums is not None and sums.shape == shape:
            self._sums = sums
            self._frames = int(stored.get("frames", 0))

    def observe(
        self, latent: Float[Tensor, "c u y x"], video: Float[Tensor, "3 t h w"], *, start: bool
    ) -> None:
        """Learn from decoded latent frames; `start`: the first one is the first of a video."""
        if self._frames >= ENOUGH_FRAMES:
            return
        time = self._scale.time
        frames = F.avg_pool2d(video.float().transpose(0, 1), self._scale.space)
        lead = frames[:1].expand(time - 1, -1, -1, -1) if start else frames[:0]
        colours = rearrange(torch.cat([lead, frames]), "(u n) c y x -> u n c y x", n=time).mean(1)
        cells = _with_one(rearrange(latent.float(), "c u y x -> (u y x) c"))
        known = torch.cat([cells, rearrange(colours, "u c y x -> (u y x) c")], dim=1)
        sums = (cells.T @ known).cpu().double()
        if not sums.isfinite().all():
            return
        self._sums += sums
        self._frames += latent.shape[1]
        self._save()

    def picture(self, latent: Float[Tensor, "c y x"]) -> Float[Tensor, "3 h w"] | None:
        """Return the pixels of a latent frame at full size; None before anything was decoded."""
        if not self._frames:
            return None
        channels = len(latent)
        squares = self._sums[:, : channels + 1].clone()
        squares += _RIDGE * squares[-1, -1] * torch.eye(channels + 1, dtype=squares.dtype)
        weights = _solve(squares, self._sums[:, channels + 1 :]).float()
        cells = _with_one(rearrange(latent.float().cpu(), "c y x -> (y x) c"))
        colours = rearrange(cells @ weights, "(y x) c -> 1 c y x", y=latent.shape[1])
        return F.interpolate(colours, scale_factor=self._scale.space, mode="bilinear")[0]

    @property
    def _path(self) -> Path | None:
        folder = cache_folder()
        return None if folder is None else folder / f"preview-{self._name}.safetensors"

    def _save(self) -> None:
        """Keep the sums for later runs, if the cache folder can be written."""
        if (path := self._path) is None:
            return
        tensors = {"sums": self._sums, "frames": torch.tensor(self._frames)}
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(tensors))

    def _load(self) -> dict[str, Tensor] | None:
        """Read the sums of earlier runs; a missing or damaged file counts as none."""
        if (path := self._path) is None:
            return None
        try:
            return load(path.read_bytes())
        except (OSError, SafetensorError):
            return None


def _with_one(cells: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
    """Append a channel of ones, for the constant of the map."""
    return torch.cat([cells, torch.ones_like(cells[:, :1])], dim=1)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, right)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
