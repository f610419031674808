"""Guided sampling of a Wan transformer on a CPU against diffusers' pipeline, equal outputs.

python bench/wan_sampling.py --tokens 1560 --dtype bf16 --steps 8 --runs 7
Width 768, 12 layers, random weights, the same start noise and embeddings. Runs alternate in one
process; the time is CPU time, so that other work on the machine disturbs less. One line of JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from skyloom.core.types import LatentShape
from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.schedule import diffusers_sigmas
from skyloom.diffusion.unipc import sample_unipc
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.sampling import model_levels
from skyloom.models.checkpoint import build
from skyloom.models.family import Schedule
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.state_dict import WanState
from skyloom.models.wan.transformer import Wan

GRIDS = {1560: (5, 24, 52), 6240: (5, 48, 104)}
TEXT = 60
GUIDANCE = 5.0
SHIFT = 5.0


class _State:
    """A state dict as a source of weights."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state
        self.shapes = {name: tuple(value.shape) for name, value in state.items()}

    def read(self, name: str) -> Tensor:
        return self._state[name]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, choices=GRIDS, default=1560)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=4096,
        freq_dim=256,
        ffn_dim=3072,
        num_layers=12,
    ).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.ndim > 1 and "table" not in name:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    state = theirs.state_dict()
    config = WanConfig(16, 16, width=768, heads=6, layers=12, ffn=3072, text_width=4096)
    source = WanState(_State(state), config)
    wan = build(lambda: Wan(config), source, torch.device("cpu"), dtype)
    theirs = _keep_in_fp32(theirs, dtype)
    grid = GRIDS[options.tokens]
    noise = torch.randn(1, 16, *grid)
    prompts = [torch.randn(1, TEXT, 4096) for _ in range(2)]
    calls = {
        "diffusers": lambda: _with_diffusers(theirs, noise, prompts, options.steps, dtype),
        "skyloom": lambda: _with_skyloom(wan, noise, prompts, options.steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    made: dict[str, Tensor] = {}
    for _ in range(options.runs):
        for name, call in calls.items():
            start = time.process_time()
            made[name] = call()
            seconds[name].append(time.process_time() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    pairs = zip(seconds["diffusers"], seconds["skyloom"], strict=True)
    ratios = sorted(one / other for one, other in pairs)
    difference = (made["diffusers"] - made["skyloom"]).abs().max()
    row = {
        **vars(options),
        "ratio": round(median["diffusers"] / median["skyloom"], 2),
        "ratios": [round(ratio, 2) for ratio in (ratios[0], ratios[-1])],
        "cpu_seconds": {name: round(value, 1) for name, value in median.items()},
        "largest_difference": float(difference),
        "std": float(made["diffusers"].std()),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
    }
    print(json.dumps(row), flush=True)


def _keep_in_fp32(
    model: diffusers.WanTransformer3DModel, dtype: torch.dtype
) -> diffusers.WanTransformer3DModel:
    """Cast as diffusers does: the modules that it names stay in fp32."""
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def _with_diffusers(
    model: diffusers.WanTransformer3DModel,
    noise: Tensor,
    prompts: list[Tensor],
    steps: int,
    dtype: torch.dtype,
) -> Tensor:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=SHIFT,
    )
    scheduler.set_timesteps(steps)
    embedded = [
        torch.nn.functional.pad(prompt, (0, 0, 0, 512 - TEXT)).to(dtype) for prompt in prompts
    ]
    latent = noise.clone()
    for timestep in scheduler.timesteps:  # the loop of WanPipeline.__call__
        when = timestep.expand(len(latent))
        prompted, free = (
            model(latent.to(dtype), when, text, return_dict=False)[0] for text in embedded
        )
        velocity = free + GUIDANCE * (prompted - free)
        latent = scheduler.step(velocity, timestep, latent, return_dict=False)[0]
    return latent.float()


def _with_skyloom(wan: Wan, noise: Tensor, prompts: list[Tensor], steps: int) -> Tensor:
    with torch.no_grad():
        texts = [wan.prepare_text(prompt.to(wan.dtype)) for prompt in prompts]
    executor = DeterministicExecutor(torch.device("cpu"))
    sigmas = diffusers_sigmas(steps, SHIFT)
    levels = model_levels(Schedule("unipc", "diffusers", shift=SHIFT), steps)
    denoiser = Denoiser(wan, executor, texts, GUIDANCE, student=False, model_levels=levels)
    canvas = Canvas.text_to_video(16, LatentShape(*noise.shape[2:]))
    *_, last = sample_unipc(denoiser.velocity, noise, sigmas, canvas)
    return last.latent


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "")
    found = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return " ".join([name, *found])


if __name__ == "__main__":
    main()
