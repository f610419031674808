"""Compare the time of a video with diffusers' WanPipeline: 128x128, 4 steps, no guidance, CPU.

python bench/pipeline.py [--repeats 5] [--seconds 5] [--model FOLDER]

Times run from the loaded model to frames in memory. skyloom encodes its prompt; diffusers gets
embeddings. The diffusers transformer has the same size and random weights, in bf16 and inference
mode, with the same threads. It runs with two autoencoders with few channels: Wan 2.1 (8x8 pixels
per latent) and Wan 2.2 (16x16, as in skyloom, so both transformers have the same number of tokens).
The sides take turns; a ratio above 1 means that skyloom is faster. skyloom generates in windows
with constant memory, diffusers all frames at once. Prints one JSON line.
"""

import argparse
import json
import statistics
import time

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

import skyloom
from skyloom.generate.pipeline import Pipeline
from skyloom.generate.request import Request

STEPS = 4
TEXT_TOKENS = 32
TEXT_WIDTH = 384
AUTOENCODERS = {
    "wan 2.1 autoencoder": {"base_dim": 32},
    "wan 2.2 autoencoder": {
        "base_dim": 32,
        "decoder_base_dim": 32,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}


def build(autoencoder: dict[str, object], ours: Pipeline) -> WanPipeline:
    """Build a WanPipeline with a transformer of the same size as skyloom's."""
    torch.manual_seed(0)
    config = ours.transformer.config
    vae = AutoencoderKLWan(**autoencoder).eval().bfloat16()
    channels = vae.config.z_dim
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.heads,
        attention_head_dim=config.head_width,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=config.ffn,
        num_layers=config.layers,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer.eval().bfloat16(),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_theirs(pipe: WanPipeline, frames: int) -> dict[str, float]:
    """Generate one video with diffusers; all frames become available at the end."""
    embeds = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, dtype=torch.bfloat16)
    started = time.perf_counter()
    with torch.inference_mode():
        made = pipe(
            prompt_embeds=embeds,
            height=128,
            width=128,
            num_frames=frames,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            output_type="pt",
        ).frames
    assert made.shape[1] == frames, made.shape
    whole = time.perf_counter() - started
    return {"whole": whole, "first_frames": whole}


def make_ours(pipe: Pipeline, seconds: float, seed: int) -> dict[str, float]:
    """Generate one video with skyloom; measure the total time and the time to the first frames."""
    request = Request(
        "a dog running to the right on the beach", seconds=seconds, seed=seed, num_steps=STEPS
    )
    request = request.with_fields({"guidance_scale": 1.0})
    started = time.perf_counter()
    first = 0.0
    frames: list[torch.Tensor] = []
    for step in pipe.stream(request, collect=False):
        if step.frames is not None:
            first = first or time.perf_counter() - started
            frames.append(step.frames)
    whole = time.perf_counter() - started
    assert len(torch.cat(frames)) == pipe.plan(request).shape.frames
    return {"whole": whole, "first_frames": first}


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Compute minimum and median of each time, in seconds."""
    results: dict[str, float] = {}
    for kind in ("whole", "first_frames"):
        values = [run[kind] for run in runs]
        results[f"{kind}_min"] = round(min(values), 3)
        results[f"{kind}_median"] = round(statistics.median(values), 3)
    return results


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="diorama")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    ours = skyloom.load(given.model)
    frames = ours.plan(Request("a", seconds=given.seconds)).shape.frames
    sides = {name: build(config, ours) for name, config in AUTOENCODERS.items()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("skyloom", *sides)}
    for turn in range(given.repeats + 1):
        made = {"skyloom": make_ours(ours, given.seconds, turn)}
        made |= {name: make_theirs(pipe, frames) for name, pipe in sides.items()}
        if turn:
            for name, times in made.items():
                runs[name].append(times)
    results = {name: summary(times) for name, times in runs.items()}
    ratios = {
        name: {
            "of_minima": round(results[name]["whole_min"] / results["skyloom"]["whole_min"], 2),
            "of_medians": round(
                results[name]["whole_median"] / results["skyloom"]["whole_median"], 2
            ),
        }
        for name in sides
    }
    plays = frames / ours.info.fps
    print(
        json.dumps(
            {
                "frames": frames,
                "threads": given.threads,
                "torch": torch.__version__,
                "seconds": results,
                "ratios": ratios,
                "plays_seconds": round(plays, 2),
                "faster_than_it_plays": round(plays / results["skyloom"]["whole_median"], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
