"""Evaluate stills of trained networks: probe accuracies, tile borders, gradients, contact sheet.

python projects/diorama/bench/network_stills.py RUN --decoder .runs/decoder32 --sheet s32.png

`--renders` instead of a run evaluates the prompts' own renders; `--decoded` evaluates those after
the autoencoder. One prompt per held-out still with a single subject; prints one JSON line. Pictures
are averaged to 128x128 first.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from diorama.train.autoencoders import load_autoencoder
from skyloom.data.encode import to_pixels
from skyloom.data.loader import CaptionTable
from skyloom.data.shards import read_shards, used_captions
from skyloom.diffusion.flow import to_velocity
from skyloom.diffusion.schedule import make_sigmas
from skyloom.models.checkpoint import from_int8, load_into, load_part
from skyloom.models.diorama.autoencoder import DioramaAutoencoder, shrink
from skyloom.models.diorama.config import UNetConfig
from skyloom.models.diorama.probe import load_probe, prepare
from skyloom.models.diorama.transformer import UNet

BATCH = 24


@torch.no_grad()
def sample(
    network: UNet, table: CaptionTable, captions: list[str], steps: int, scale: float, shift: float
) -> Float[Tensor, "n c 1 h w"]:
    """Guided Euler samples, one per caption."""
    generator, made = torch.Generator().manual_seed(7), []
    size = network.config.grid
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        rows = [table.index[caption] for caption in part] + [table.index[""]] * len(part)
        context, mask, pooled = table.gather(rows)
        text = network.prepare_text(context, mask, pooled)
        x = torch.randn(len(part), network.config.channels, 1, size, size, generator=generator)
        sigmas = make_sigmas(steps, shift)
        for now, after in pairwise(sigmas):
            both, level = torch.cat([x, x]), torch.full((2 * len(part), 1), float(now))
            velocity = to_velocity(
                network.config.prediction, network(both, level, text).float(), both, level
            )
            prompted, free = velocity.chunk(2)
            x = x + (after - now) * (free + scale * (prompted - free))
        made.append(x)
    return torch.cat(made)


@torch.no_grad()
def decode(
    autoencoder: DioramaAutoencoder, latent: Float[Tensor, "n c 1 h w"], *, linear: bool = False
) -> UInt8[Tensor, "n h w c"]:
    """Decode, by default at the decoder's resolution, else by the components alone."""
    parts = []
    for piece in latent.split(BATCH):
        if linear:
            parts.append(autoencoder.decoder.inverse(piece)[:, -3:])
            continue
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(autoencoder.decode(piece)[:, :, 0].float())
    return to_bytes(torch.cat(parts))


def to_bytes(x: Float[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n h w 3"]:
    """Pixels in [-1, 1] to bytes."""
    return rearrange((x.clamp(-1, 1) + 1) * 127.5, "n c h w -> n h w c").round().byte()


def picture_statistics(frames: UInt8[Tensor, "n h w c"]) -> dict[str, float]:
    """Return the gradient at tile borders relative to elsewhere, and its 99th percentile."""
    luminance = (frames.float() / 255) @ torch.tensor([0.299, 0.587, 0.114])
    across = (luminance[:, :, 1:] - luminance[:, :, :-1]).abs()
    down = (luminance[:, 1:] - luminance[:, :-1]).abs()
    magnitude = (across[:, :-1].square() + down[:, :, :-1].square()).sqrt()
    found = {"p99": float(np.quantile(magnitude.numpy(), 0.99))}
    for tile in (32, 16, 8):
        border = torch.zeros(across.shape[2], dtype=torch.bool)
        border[tile - 1 :: tile] = True
        found[f"tile{tile}"] = float(across[:, :, border].mean() / across[:, :, ~border].mean())
    return found


@torch.no_grad()
def read_by_probe(frames: UInt8[Tensor, "n h w c"], facts: list[dict]) -> dict[str, float]:
    """Return the probe's accuracies of nouns (top 1 and top 5), places and times of day."""
    probe, scores = load_probe(), {}
    for frame in frames:
        for name, values in probe(prepare(frame[None], probe.config)).scores.items():
            scores.setdefault(name, []).append(values)
    found = {}
    for fact in ("noun", "place", "time_of_day"):
        labels = probe.config.labels(fact)
        known = [i for i, one in enumerate(facts) if one[fact] in labels]
        wanted = torch.tensor([labels.index(facts[i][fact]) for i in known])
        read = torch.cat(scores[fact])[known]
        found[fact] = float((read.argmax(1) == wanted).float().mean())
        if fact == "noun":
            found["noun among 5"] = float(
                (read.topk(5).indices == wanted[:, None]).any(1).float().mean()
            )
    return found


def held_out(folder: Path, count: int) -> tuple[list[str], list[dict], UInt8[Tensor, "n h w c"]]:
    """Return captions, facts and renders of stills with one subject; different nouns first."""
    captions, facts, frames = [], [], []
    for shard, rows in read_shards(folder):
        for frame, row in zip(shard, rows, strict=True):
            if len(row["facts"]["nouns"]) == 1:
                captions.append(used_captions(row, 1)[0])
                facts.append(row["facts"])
                frames.append(torch.from_numpy(np.array(frame[0])))
    seen, order = set(), []
    for index, fact in enumerate(facts):
        if fact["noun"] not in seen:
            seen.add(fact["noun"])
            order.append(index)
    order = (order + [index for index in range(len(facts)) if index not in set(order)])[:count]
    return (
        [captions[i] for i in order],
        [facts[i] for i in order],
        torch.stack([frames[i] for i in order]),
    )


def write_sheet(
    frames: UInt8[Tensor, "n h w c"], captions: list[str], path: Path, columns: int = 7
) -> None:
    """Write a contact sheet with captions."""
    width, line = 200, 14
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (width + line + 2)), (20, 20, 24))
    draw = ImageDraw.Draw(sheet)
    for index, (frame, caption) in enumerate(zip(frames, captions, strict=True)):
        x, y = index % columns * (width + 4), index // columns * (width + line + 2)
        sheet.paste(
            Image.fromarray(frame.numpy()).resize((width, width), Image.Resampling.BICUBIC),
            (x, y + line),
        )
        draw.text((x + 2, y + 1), caption[:36], fill=(230, 230, 230))
    sheet.save(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--renders", action="store_true")
    parser.add_argument("--decoded", action="store_true")
    parser.add_argument("--decoder", type=Path)
    parser.add_argument("--linear", action="store_true", help="decode by the components alone")
    parser.add_argument("--stills", type=Path, default=Path(".runs/data/stills_heldout"))
    parser.add_argument("--captions", type=Path, default=Path(".runs/data/captions.safetensors"))
    parser.add_argument("--count", type=int, default=132)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--shift", type=float, default=3.0)
    parser.add_argument("--sheet", type=Path)
    arguments = parser.parse_args()
    captions, facts, renders = held_out(arguments.stills, arguments.count)
    started = time.process_time()
    if arguments.renders:
        frames = renders
    elif arguments.decoded:
        autoencoder = load_autoencoder(arguments.decoder)
        with torch.no_grad():
            latent = autoencoder.encode_small(to_pixels(renders[:, None]))
        frames = decode(autoencoder, latent, linear=arguments.linear)
    else:
        config, state, _ = load_part(arguments.run, "unet", UNetConfig)
        network = UNet(config)
        load_into(network, from_int8(state))
        network = network.to(torch.bfloat16).eval()
        table = CaptionTable(arguments.captions)
        latent = sample(
            network, table, captions, arguments.steps, arguments.guidance, arguments.shift
        )
        frames = decode(load_autoencoder(arguments.decoder), latent, linear=arguments.linear)
    spent = time.process_time() - started
    small = frames
    if frames.shape[1] > renders.shape[1]:
        pixels = rearrange(frames.float() / 127.5 - 1, "n h w c -> n c 1 h w")
        small = to_bytes(shrink(pixels, frames.shape[1] // renders.shape[1])[:, :, 0])
    found = {**read_by_probe(small, facts), **picture_statistics(small)}
    if arguments.sheet:
        write_sheet(frames[:35], captions[:35], arguments.sheet)
    name = (
        "renders"
        if arguments.renders
        else f"decoded {arguments.decoder}"
        if arguments.decoded
        else arguments.run
    )
    rounded = {key: round(value, 4) for key, value in found.items()}
    settings = {"steps": arguments.steps, "guidance": arguments.guidance}
    print(
        json.dumps(
            {
                "run": str(name),
                "count": len(frames),
                **settings,
                **rounded,
                "cpu_s": round(spent, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
