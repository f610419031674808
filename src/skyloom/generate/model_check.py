"""Check a model with fixed inputs: twelve numbers that two machines can compare; effects of LoRAs.

A fixed picture is encoded, noise is added, one step removes it, and the result is decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skyloom.core.errors import CheckpointError
from skyloom.core.seeds import noise
from skyloom.diffusion.flow import add_noise, denoised_from_velocity, to_velocity
from skyloom.generate.loras import LoraFile
from skyloom.generate.pipeline import Pipeline
from skyloom.models.base import TextContext, Transformer

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
        inputs = _inputs(pipeline)
        with bundle.use("transformer") as transformer:
            prediction = _predict(transformer, inputs)
        latent, noisy, sigma = (inputs.latent, inputs.noisy, inputs.sigma)
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


@torch.no_grad()
def lora_effects(
    pipeline: Pipeline, loras: Sequence[LoraFile]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return how much each LoRA alone moves one call of the transformer, and notices on the files.

    The effect is the norm of the change of the output divided by that of the output: 0.1 is 10 %.
    Raises RequestError for a LoRA that does not fit the model.
    """
    inputs = _inputs(pipeline)
    effects: dict[str, float] = {}
    notices: list[str] = []
    with pipeline.bundle.use("transformer") as transformer:
        plain = _predict(transformer, inputs)
        for lora in loras:
            changed, further = pipeline.attach_loras([lora])
            difference = _predict(changed, inputs) - plain
            effects[lora.lora.name] = _norm(difference) / _norm(plain)
            notices.extend(further)
    return effects, tuple(notices)


@dataclass(frozen=True)
class _Inputs:
    """What the transformer is called with: a picture's latent with noise, and a prompt."""

    latent: Tensor
    noisy: Tensor
    sigma: Tensor
    text: TextContext


def _inputs(pipeline: Pipeline) -> _Inputs:
    with pipeline.bundle.use("text_encoder") as text_encoder:
        text = text_encoder.encode([PROMPT])
    with pipeline.bundle.use("autoencoder") as autoencoder:
        latent = autoencoder.encode(_picture(pipeline).to(autoencoder.device)).float().cpu()
    sigma = torch.full((1, 1), _SIGMA)
    noisy = add_noise(latent, noise(_SEED, tuple(latent.shape), "check"), sigma)
    return _Inputs(latent, noisy, sigma, text)


def _predict(transformer: Transformer, inputs: _Inputs) -> Tensor:
    where = (transformer.device, transformer.dtype)
    sigma = inputs.sigma.to(transformer.device)
    return transformer(inputs.noisy.to(*where), sigma, inputs.text).float().cpu()


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().square().sum().sqrt())


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
