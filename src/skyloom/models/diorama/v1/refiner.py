"""Latent refiner: convolutions at the latent's own resolution after the transformer.

The transformer predicts each patch by itself, which shows as tiles. The refiner reads every latent
frame with its neighbouring cells, the noisy input and the tokens' features; frames are independent.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class Detail(nn.Module):
    """Residual correction of the transformer's prediction; zero-initialised."""

    def __init__(
        self, channels: int, hidden: int, width: int, patch: tuple[int, int, int], blocks: int = 2
    ) -> None:
        super().__init__()
        self.patch = patch
        self.blocks = blocks
        self.features = nn.Linear(hidden, width * patch[0] * patch[1] * patch[2])
        self.enter = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1) for _ in range(2 * blocks)
        )
        self.levels = nn.Linear(hidden, 2 * blocks * width)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(
        self,
        predicted: Float[Tensor, "b c t h w"],
        noisy: Float[Tensor, "b c t h w"],
        tokens: Float[Tensor, "b n d"],
        level: Float[Tensor, "b t d"],
    ) -> Float[Tensor, "b c t h w"]:
        """Refine a prediction; tokens: of the last block; level: embedding of the noise level."""
        p, q, r = self.patch
        _, _, frames, height, width = predicted.shape
        features = rearrange(
            self.features(tokens),
            "b (t h w) (p q r k) -> (b t p) k (h q) (w r)",
            t=frames // p, h=height // q, w=width // r, p=p, q=q, r=r,
        )  # fmt: skip
        seen = rearrange(torch.cat([predicted, noisy], dim=1), "b c t h w -> (b t) c h w")
        x = (
            self.enter(
                seen.to(self.enter.weight.dtype).contiguous(memory_format=torch.channels_last)
            )
            + features
        )
        scales = rearrange(
            self.levels(F.silu(level)), "b t (k two c) -> k two (b t) c 1 1", k=self.blocks, two=2
        ).repeat_interleave(p, dim=2)
        for index in range(self.blocks):
            scale, shift = scales[index].to(x.dtype)
            y = self.convolutions[2 * index](F.silu(x))
            x = x + self.convolutions[2 * index + 1](F.silu(y * (1 + scale) + shift))
        added = rearrange(self.leave(F.silu(x)), "(b t) c h w -> b c t h w", t=frames)
        return predicted + added.to(predicted.dtype)
