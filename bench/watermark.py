"""Measure the watermark: recovery rate after each attack, PSNR, and false positives.

python bench/watermark.py --clips 40 --unmarked 10000
python bench/watermark.py --real 6 --decode

Prints one JSON line per kind of video, then one for unmarked frames. With --real: clips of 832x480
and 1280x704, attacks on these sizes, ids in the unmarked clips, and the cost of marking and of
moderation beside that of encoding the same frames, in turns.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from einops import rearrange

from skyloom.generate.pipeline import load
from skyloom.media.source import open_source
from skyloom.media.write import write_video
from skyloom.models.wan.autoencoder import WAN_2_1, WanAutoencoder
from skyloom.safety import watermark
from skyloom.safety import watermark_detector as detector
from skyloom.safety.credentials import sign
from skyloom.safety.provenance import phash
from skyloom.safety.signer import local_signer

embed = watermark.SpreadSpectrumWatermarker.mark
SUBJECTS = (
    "rocket",
    "cat",
    "blue car",
    "panda",
    "duck",
    "horse",
    "balloon",
    "penguin",
    "train",
    "butterfly",
)
PLACES = (
    "on the beach",
    "in the city at night",
    "in the snow",
    "in the desert",
    "in a forest in the rain",
)


def bundled(count: int) -> Iterator[torch.Tensor]:
    """Generate unmarked clips with the bundled model: 33 frames of 128x128."""
    pipeline = load("diorama")
    # Disable marking by the pipeline.
    watermark.SpreadSpectrumWatermarker.mark = lambda self, frames, where=None: frames
    for index in range(count):
        words = SUBJECTS[index % len(SUBJECTS)], PLACES[index // len(SUBJECTS) % len(PLACES)]
        yield pipeline.generate("a {} {}".format(*words), seed=index).frames


def leaves(count: int, size: int, frames: int = 33) -> Iterator[torch.Tensor]:
    """Generate pans over dead-leaves images (textured discs), with statistics as in photographs."""
    for seed in range(count):
        drawn = torch.Generator().manual_seed(seed)
        side = size + 40
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        picture = torch.full((3, side, side), 120.0)
        for _ in range(300):
            x, y, scale, *colour = torch.rand(6, generator=drawn).tolist()
            inside = (rows - y * side) ** 2 + (columns - x * side) ** 2 < (
                side * 0.03 / (scale + 0.04)
            ) ** 2
            picture[:, inside] = torch.tensor(colour)[:, None] * 220 + 15
        picture += (
            F.avg_pool2d(torch.randn(1, 3, side + 2, side + 2, generator=drawn), 3, 1)[0] * 12
        )
        step = [0, 0.4, 1.1][seed % 3]
        cut = [picture[:, :size, round(step * index) :][:, :, :size] for index in range(frames)]
        yield (
            rearrange(torch.stack(cut), "t c h w -> t h w c").round().clamp(0, 255).to(torch.uint8)
        )


def textures(count: int, height: int, width: int, frames: int = 33) -> Iterator[torch.Tensor]:
    """Generate zooms and pans over textures with the 1/f spectrum of photographs.

    Two textured discs move across, and every frame has its own sensor noise.
    """
    for seed in range(count):
        drawn = torch.Generator().manual_seed(seed)
        contrast = [25, 45, 60][seed % 3]
        layers = [
            spectrum(drawn, height, width) * contrast + 40 + 130 * shade
            for shade in torch.rand(3, generator=drawn).tolist()
        ]
        zoom, *steps = (torch.rand(7, generator=drawn) - 0.5).tolist()
        rows, columns = torch.meshgrid(
            torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
        )
        pictures = []
        for index in range(frames):
            time = index / 32
            scale = 0.9 - 0.1 * zoom * time
            shift = [0.1 * step * time for step in steps[:2]]
            grid = torch.stack([columns * scale + shift[0], rows * scale + shift[1]], -1)[None]
            sampled = [
                F.grid_sample(layer[None], grid, "bicubic", "reflection", align_corners=False)[0]
                for layer in layers
            ]
            for disc in range(2):
                x, y = (step * time + 0.4 * (-1) ** disc for step in steps[2 + 2 * disc :][:2])
                inside = (columns - x).square() + (rows - y).square() < 0.12
                sampled[0] = torch.where(inside, sampled[1 + disc], sampled[0])
            noise = torch.randn(sampled[0].shape, generator=drawn) * 1.5
            pictures.append((sampled[0] + noise).round().clamp(0, 255).to(torch.uint8))
        yield rearrange(torch.stack(pictures), "t c h w -> t h w c").contiguous()


def spectrum(drawn: torch.Generator, height: int, width: int) -> torch.Tensor:
    """Return a colour texture of amplitude 1/f with unit contrast, mostly in luma."""
    radius = (
        torch.fft.fftfreq(height)[:, None].square() * (height / width) ** 2
        + torch.fft.rfftfreq(width).square()
    ).sqrt()
    shaped = torch.fft.rfft2(torch.randn(4, height, width, generator=drawn))
    shaped = torch.fft.irfft2(shaped / radius.clamp(min=1 / width), s=(height, width))
    shaped = (shaped - shaped.mean((1, 2), keepdim=True)) / shaped.std((1, 2), keepdim=True)
    return shaped[:1] + 0.25 * shaped[1:]


def scenes(count: int, height: int, width: int, frames: int = 33) -> Iterator[torch.Tensor]:
    """Render scenes of the diorama world at 1/4 of the size and enlarge them: large flat areas."""
    from diorama.world.assets import builtin_atlas
    from diorama.world.make import make_clip
    from diorama.world.vocabulary import TINY

    for seed in range(count):
        clip = make_clip(seed, TINY, builtin_atlas(), frames, height // 4, width // 4, split="all")
        yield resized(clip.frames, height, width)


def coded(frames: torch.Tensor, crf: int) -> torch.Tensor:
    """Encode with x264 and decode."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coded.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=16, options={"crf": str(crf)})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for picture in frames.numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        return open_source(path).read()


def gif(frames: torch.Tensor) -> torch.Tensor:
    """Encode with skyloom's GIF writer and decode."""
    with tempfile.TemporaryDirectory() as folder:
        return open_source(write_video(frames, Fraction(16), Path(folder) / "a.gif")).read()


def scaled(frames: torch.Tensor, factor: float) -> torch.Tensor:
    """Resize to even sides."""
    return resized(frames, *(round(side * factor / 2) * 2 for side in frames.shape[1:3]))


def resized(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize, frame by frame."""
    size = (height, width)
    pictures = [
        F.interpolate(
            rearrange(frame, "h w c -> 1 c h w").float(),
            size,
            mode="bicubic",
            antialias=True,
            align_corners=False,
        )
        for frame in frames
    ]
    rounded = torch.cat(pictures).round().clamp(0, 255).to(torch.uint8)
    return rearrange(rounded, "t c h w -> t h w c").contiguous()


def cropped(frames: torch.Tensor, seed: int, share: float = 0.9) -> torch.Tensor:
    """Crop height and width to a share, at a random position."""
    height, width = (round(side * share / 2) * 2 for side in frames.shape[1:3])
    rng = random.Random(seed)
    top = rng.randint(0, frames.shape[1] - height)
    left = rng.randint(0, frames.shape[2] - width)
    return frames[:, top : top + height, left : left + width]


ATTACKS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "mp4 as written (crf 16)": lambda frames, seed: coded(frames, 16),
    "x264 crf 23": lambda frames, seed: coded(frames, 23),
    "x264 crf 28": lambda frames, seed: coded(frames, 28),
    "gif": lambda frames, seed: gif(frames),
    "half size": lambda frames, seed: coded(scaled(frames, 0.5), 16),
    "half size, crf 23": lambda frames, seed: coded(scaled(frames, 0.5), 23),
    "0.75 size": lambda frames, seed: coded(scaled(frames, 0.75), 16),
    "1.5 size, crf 23": lambda frames, seed: coded(scaled(frames, 1.5), 23),
    "crop 10 %": lambda frames, seed: coded(cropped(frames, seed), 16),
    "crop 10 %, crf 23": lambda frames, seed: coded(cropped(frames, seed), 23),
}

REAL_ATTACKS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "x264 crf 28": lambda frames, seed: coded(frames, 28),
    "crop to 90 %, crf 23": lambda frames, seed: coded(cropped(frames, seed), 23),
    "crop to 70 %, crf 23": lambda frames, seed: coded(cropped(frames, seed, 0.7), 23),
    "half size, crf 23": lambda frames, seed: coded(scaled(frames, 0.5), 23),
    "1280x720, crf 23": lambda frames, seed: coded(resized(frames, 720, 1280), 23),
    "854x480, crf 23": lambda frames, seed: coded(resized(frames, 480, 854), 23),
}


def measure(
    name: str,
    clips: Iterator[torch.Tensor],
    attacks: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = ATTACKS,
) -> dict[str, object]:
    """Compute the recovery rate of each attack, the lowest PSNR and the slowest detection."""
    found: Counter[str] = Counter()
    wrong = 0
    lowest = math.inf
    count = 0
    slowest = 0.0
    for seed, frames in enumerate(clips):
        identity = watermark.watermark_id(f"{name}/{seed}")
        marked = embed(watermark.SpreadSpectrumWatermarker(identity), frames)
        error = sum(
            float((one.float() - other.float()).square().mean())
            for one, other in zip(marked, frames, strict=True)
        )
        lowest = min(lowest, 10 * math.log10(255**2 * len(frames) / error))
        count += 1
        for attack, apply in attacks.items():
            attacked = apply(marked, seed)
            since = time.process_time()
            mark = detector.detect(attacked)
            slowest = max(slowest, time.process_time() - since)
            found[attack] += mark is not None and mark.identity == identity
            wrong += mark is not None and mark.identity != identity
    shares = {attack: round(found[attack] / count, 3) for attack in attacks}
    return {
        "clips": name,
        "count": count,
        "psnr": round(lowest, 2),
        "wrong": wrong,
        "recovered": shares,
        "slowest read, CPU s": round(slowest, 2),
    }


def measure_false_positives(count: int, searched: int) -> dict[str, object]:
    """Count ids found in unmarked textures; the first `searched` are also searched in crops."""
    highest = 0.0
    found = 0
    for seed in range(count):
        noise = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(seed))
        smooth = (
            F.interpolate(F.avg_pool2d(noise, 4), (128, 128), mode="bilinear") * 60
            + noise * 3
            + 120
        )
        frames = rearrange(smooth.clamp(0, 255).to(torch.uint8), "t 1 h w -> t h w 1").expand(
            -1, -1, -1, 3
        )
        highest = max(highest, *detector.highest_scores(frames))
        found += detector.detect(frames, crops=seed < searched) is not None
    return {
        "unmarked": count,
        "searched for crops too": min(count, searched),
        "found": found,
        "highest score": round(highest, 2),
        "needed": min(search.threshold for search in detector.SEARCHES),
    }


def measure_unmarked(name: str, clips: Iterator[torch.Tensor]) -> dict[str, object]:
    """Count ids found in unmarked clips and in their crops; return the highest scores."""
    highest = [0.0] * len(detector.SEARCHES)
    count = 0
    found = 0
    for seed, frames in enumerate(clips):
        for video in (frames, cropped(frames, seed, 0.7)):
            count += 1
            found += detector.detect(video) is not None
            highest = list(map(max, highest, detector.highest_scores(video)))
    names = [search.band.name for search in detector.SEARCHES]
    scores = {one: round(score, 2) for one, score in zip(names, highest, strict=True)}
    return {"unmarked": name, "count": count, "found": found, "highest scores": scores}


def measure_cost(height: int, width: int, repeats: int, *, decode: bool) -> dict[str, object]:
    """Time marking, moderation, signing, encoding and decoding of 33 frames, in turns.

    Returns CPU milliseconds a frame (medians), and marking over what encodes and makes the frames.
    Decoding is that of Wan 2.1's autoencoder with random weights, of one latent frame after the
    first, once.
    """
    frames = next(textures(1, height, width))
    calls: dict[str, Callable[[], object]] = {
        "mark": lambda: embed(watermark.SpreadSpectrumWatermarker("0" * 12), frames),
        "moderate": lambda: [phash(frame) for frame in frames[::16]],
    }
    times: dict[str, list[float]] = {name: [] for name in (*calls, "encode", "sign")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        signer = local_signer(Path(folder) / "signer")
        calls["encode"] = lambda: write_video(frames, Fraction(16), path)
        calls["sign"] = lambda: sign(path, {}, signer)
        for _ in range(repeats):
            for name, call in calls.items():
                since = time.process_time()
                call()
                times[name].append((time.process_time() - since) / len(frames) * 1000)
    spent = {name: statistics.median(values) for name, values in times.items()}
    if decode:
        spent["decode"] = time_decoding(height, width)
    making = spent["encode"] + spent.get("decode", 0.0)
    return {
        "cost": f"{width}x{height}",
        "CPU ms a frame": {name: round(value, 2) for name, value in spent.items()},
        "mark / encode": round(spent["mark"] / spent["encode"], 4),
        "mark / (encode + decode)": round(spent["mark"] / making, 6) if decode else None,
    }


@torch.no_grad()
def time_decoding(height: int, width: int) -> float:
    """Return CPU milliseconds a frame of decoding one latent frame after the first."""
    autoencoder = WanAutoencoder(WAN_2_1)
    autoencoder.place(torch.device("cpu"), torch.float32)
    latent = torch.randn(1, WAN_2_1.channels, 1, height // 8, width // 8)
    _, cache = autoencoder.decode_step(latent, None)
    since = time.process_time()
    pixels, _ = autoencoder.decode_step(latent, cache)
    return (time.process_time() - since) / pixels.shape[2] * 1000


def run_real(clips: int, *, decode: bool) -> None:
    """Print detection, false positives and cost at the sizes of the open models."""
    for height, width in ((480, 832), (704, 1280)):
        kinds = {"textures": textures, "scenes": scenes}
        for kind, make in kinds.items():
            name = f"{kind} {width}x{height}"
            print(json.dumps(measure(name, make(clips, height, width), REAL_ATTACKS)), flush=True)
            print(json.dumps(measure_unmarked(name, make(clips, height, width))), flush=True)
        print(json.dumps(measure_cost(height, width, 5, decode=decode)), flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--large", type=int, default=6)
    parser.add_argument("--unmarked", type=int, default=1000)
    parser.add_argument("--searched", type=int, default=300, help="of the unmarked, also for crops")
    parser.add_argument("--real", type=int, default=0, help="clips of each kind and real size")
    parser.add_argument("--decode", action="store_true", help="with --real: also time decoding")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.real:
        run_real(arguments.real, decode=arguments.decode)
        return
    since = time.perf_counter()
    kinds = [
        ("bundled 128x128", bundled(arguments.clips)),
        ("leaves 128x128", leaves(arguments.clips // 2, 128)),
        ("leaves 256x256", leaves(arguments.large, 256)),
        ("leaves 512x512", leaves(arguments.large, 512)),
    ]
    for name, clips in kinds:
        print(json.dumps(measure(name, clips)), flush=True)
    unmarked = measure_false_positives(arguments.unmarked, arguments.searched)
    print(json.dumps({**unmarked, "seconds": round(time.perf_counter() - since)}))


if __name__ == "__main__":
    main()
