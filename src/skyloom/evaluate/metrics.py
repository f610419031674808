"""Image distances, accuracies with standard errors, and the Fréchet distance of features.

PSNR in dB and SSIM (Wang et al. 2004) over frames with values in [0, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_LUMINANCE = 0.01**2
_CONTRAST = 0.03**2


def psnr(first: Float[Tensor, "n c h w"], second: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each frame in dB, at most 100."""
    error = (first - second).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp(min=1e-10))


def ssim(
    first: Float[Tensor, "n c h w"], second: Float[Tensor, "n c h w"], window: int = 7
) -> Float[Tensor, " n"]:
    """Structural similarity of each frame with a square window; 1 for equal frames."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    mean_first = mean(first)
    mean_second = mean(second)
    variance_first = mean(first * first) - mean_first.square()
    variance_second = mean(second * second) - mean_second.square()
    covariance = mean(first * second) - mean_first * mean_second
    luminance = (2 * mean_first * mean_second + _LUMINANCE) / (
        mean_first.square() + mean_second.square() + _LUMINANCE
    )
    contrast = (2 * covariance + _CONTRAST) / (variance_first + variance_second + _CONTRAST)
    return (luminance * contrast).mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class Share:
    """A mean over independent cases, its standard error, and the number of cases."""

    value: float
    error: float
    cases: int


def share_of(cases: Sequence[Sequence[bool | float]]) -> Share:
    """Average over cases the mean within each case; values within a case are dependent."""
    means = [sum(case) / len(case) for case in cases if case]
    if not means:
        return Share(math.nan, math.nan, 0)
    count = len(means)
    value = sum(means) / count
    if count == 1:
        return Share(value, math.nan, 1)
    variance = sum((mean - value) ** 2 for mean in means) / (count - 1)
    return Share(value, math.sqrt(variance / count), count)


def ratio_with_interval(
    pairs: Float[Tensor, "n 2"], draws: int = 4000
) -> tuple[float, float, float]:
    """Return the ratio of two means over the same cases with its 95 % bootstrap interval.

    Resamples cases (Efron 1979) with a fixed seed. NaN if the second mean is 0.
    """
    random = torch.Generator().manual_seed(0)
    picked = (
        pairs[torch.randint(0, len(pairs), (draws, len(pairs)), generator=random)].double().mean(1)
    )
    ratios = (picked[:, 0] / picked[:, 1])[picked[:, 1] > 0]
    means = pairs.double().mean(0)
    if not len(ratios) or not float(means[1]) > 0:
        return math.nan, math.nan, math.nan
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(means[0] / means[1]), low, high


def frechet_distance(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> float:
    """Fréchet distance between two sets of features, each modelled as a Gaussian.

    Heusel et al. 2017 (arXiv 1706.08500). It falls with the number of samples: compare only
    distances of equal counts.
    """
    one = first.double()
    other = second.double()
    covariance_one = _covariance(one)
    covariance_other = _covariance(other)
    values, vectors = torch.linalg.eigh(covariance_one)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_other @ root).clamp(min=0).sqrt().sum()
    means = (one.mean(0) - other.mean(0)).square().sum()
    return max(0.0, float(means + covariance_one.trace() + covariance_other.trace() - 2 * cross))


def _covariance(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    centered = x - x.mean(0)
    return centered.T @ centered / max(1, len(x) - 1)
