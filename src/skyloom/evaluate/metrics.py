"""Picture distances: PSNR in dB and SSIM (Wang et al. 2004) over frames with values in [0, 1]."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_LUMINANCE, _CONTRAST = 0.01**2, 0.03**2


def psnr(first: Float[Tensor, "n c h w"], second: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each frame in dB, for values in [0, 1]; 100 at most."""
    error = (first - second).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp(min=1e-10))


def ssim(
    first: Float[Tensor, "n c h w"], second: Float[Tensor, "n c h w"], window: int = 7
) -> Float[Tensor, " n"]:
    """Structural similarity of each frame with a square window, for values in [0, 1]; 1 is equal."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    mean_first, mean_second = mean(first), mean(second)
    variance_first = mean(first * first) - mean_first.square()
    variance_second = mean(second * second) - mean_second.square()
    covariance = mean(first * second) - mean_first * mean_second
    luminance = (2 * mean_first * mean_second + _LUMINANCE) / (
        mean_first.square() + mean_second.square() + _LUMINANCE
    )
    contrast = (2 * covariance + _CONTRAST) / (variance_first + variance_second + _CONTRAST)
    return (luminance * contrast).mean(dim=(1, 2, 3))
