"""Picture distances: PSNR in dB and SSIM (Wang et al. 2004) over frames with values in [0, 1].

Also shares of right answers with their standard errors, and the Fréchet distance between clouds of features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Share:
    """A share of right answers, its standard error, and how many independent cases it stands on."""

    value: float
    error: float
    cases: int


def share_of(cases: Sequence[Sequence[bool | float]]) -> Share:
    """The mean over cases of the mean within each; what lies within a case is not independent."""
    means = [sum(case) / len(case) for case in cases if case]
    if not means:
        return Share(math.nan, math.nan, 0)
    value, count = sum(means) / len(means), len(means)
    if count == 1:
        return Share(value, math.nan, 1)
    variance = sum((mean - value) ** 2 for mean in means) / (count - 1)
    return Share(value, math.sqrt(variance / count), count)


def ratio_with_interval(
    pairs: Float[Tensor, "n 2"], draws: int = 4000
) -> tuple[float, float, float]:
    """The ratio of two means over the same cases, and its 95 % interval by resampling cases (Efron 1979).

    The draws are always the same. Where the second mean is 0, the ratio is not a number.
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
    """The Fréchet distance between two clouds of features, each seen as a Gaussian (Heusel et al. 2017).

    It falls with the number of samples: compare only distances of equal counts.
    """
    one, other = first.double(), second.double()
    spread_one, spread_other = _covariance(one), _covariance(other)
    values, vectors = torch.linalg.eigh(spread_one)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ spread_other @ root).clamp(min=0).sqrt().sum()
    apart = (one.mean(0) - other.mean(0)).square().sum()
    return max(0.0, float(apart + spread_one.trace() + spread_other.trace() - 2 * cross))


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / max(1, len(x) - 1)
