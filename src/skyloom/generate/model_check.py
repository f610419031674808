"""Check a model with fixed inputs: twelve numbers that two machines can compare.

A fixed picture is encoded, noise is added, one step removes it, and the result is decoded.
"""

import torch
from torch import Tensor

from skyloom.core.errors import CheckpointError
from skyloom.core.seeds import noise
from skyloom.diffusion.flow import add_noise, denoised_from_velocity, to_velocity
from skyloom.generate.pipeline import Pipeline

PROMPT = "a red ball on a beach"
Statistics = tuple[float, float, float, float]
_MIN_SIDE = 128
_SIGMA = 0.9
_SEED = 0


def check_model(pipeline: Pipeline) -> dict[str, Statistics]:
    """Return mean, standard deviation, minimum and maximum of latent, clean estimate and pixels.

    Raises CheckpointError if one of them is not finite.
    """
    bundle = pipeline.bundle
    with torch.no_grad():
        with bundle.use("text_encoder") as text_encoder:
            text = text_encoder.encode([PROMPT])
        with bundle.use("autoencoder") as autoencoder:
            latent = autoencoder.encode(_picture(pipeline).to(autoencoder.device)).float().cpu()
        sigma = torch.full((1, 1), _SIGMA)
        noisy = add_noise(latent, noise(_SEED, tuple(latent.shape), "check"), sigma)
        with bundle.use("transformer") as transformer:
            where = (transformer.device, transformer.dtype)
            prediction = transformer(noisy.to(*where), sigma.to(transformer.device), text)
            prediction = prediction.float().cpu()
            velocity = to_velocity(transformer.prediction, prediction, noisy, sigma)
        estimate = denoised_from_velocity(noisy, velocity, sigma)
        with bundle.use("autoencoder") as autoencoder:
            pixels = autoencoder.decode(estimate.to(autoencoder.device)).float().cpu()
    tensors = {"latent": latent, "estimate": estimate, "pixels": pixels}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{pipeline.info.name} gives numbers that are not finite in its {name}.",
                hint=f"Run: skyloom models verify {pipeline.info.name}. If the files are as they "
                "should be, try another device.",
            )
    return {name: _statistics(tensor) for name, tensor in tensors.items()}


def _picture(pipeline: Pipeline) -> Tensor:
    """Draw a picture of waves in three colours, [1, 3, 1, side, side] in [-1, 1]."""
    multiple = pipeline.info.size_rule.multiple
    side = -(-_MIN_SIDE // multiple) * multiple
    ramp = torch.linspace(0, 1, side)
    across = ramp.expand(side, side)
    waves = [torch.sin(6 * across), torch.cos(9 * across.T), torch.sin(5 * (across + across.T))]
    return torch.stack(waves)[None, :, None]


def _statistics(tensor: Tensor) -> Statistics:
    values = (tensor.mean(), tensor.std(), tensor.min(), tensor.max())
    return tuple(float(value) for value in values)  # type: ignore[return-value]
