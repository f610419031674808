"""Compare rollout settings over 60 seconds: drift curves, contact sheets and a table.

python projects/diorama/examples/long.py [--seconds S] [--count N] [--only NAME ...]

Needs the atlas (`diorama world assets`) for real renders of the same scenes. Writes
docs/images/long/ and docs/images/long/drift.json, the source of the table in docs/long.md. Earlier
measurements of other settings are kept.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

import skyloom
from diorama.evaluate.compare import compare_drift
from diorama.evaluate.prompts import prompts_for
from diorama.world.assets import load_atlas
from diorama.world.vocabulary import SMALL
from skyloom.models.diorama.probe import load_probe
from skyloom.models.registry import Rollout

OUT = Path(__file__).parents[3] / "docs" / "images" / "long"
DEFAULT = "default"
EARLIER = {"window": 3, "steadiness": 0.0}  # base of the rejected settings
OPTIONS: dict[str, dict[str, float]] = {
    DEFAULT: {},
    "window-of-3": {"window": 3},
    "window-of-3-not-steadied": EARLIER,
    "no-sink": {**EARLIER, "sink": 0},
    "noised-context-.15": {**EARLIER, "context_sigma": 0.15},
    "long-memory": {**EARLIER, "recent": 6},
    "short-memory": {**EARLIER, "recent": 1},
    "window-of-1": {**EARLIER, "window": 1},
}
SHEET_PROMPT = "a red car driving to the left on the beach at sunset"
PART_SECONDS = 5
CURVES = ("contrast", "sharpness", "speed", "colour change", "Fréchet distance", "subject read")
COLOURS = (
    "#e377c2",
    "#111111",
    "#d62728",
    "#1f77b4",
    "#17becf",
    "#2ca02c",
    "#98df8a",
    "#ff7f0e",
    "#9467bd",
    "#8c564b",
)


class Fixed:
    """A pipeline with fixed rollout settings, smoothing level and length."""

    def __init__(
        self, pipeline: skyloom.Pipeline, rollout: Rollout, steadiness: float, seconds: float
    ) -> None:
        manifest = {**pipeline.info.manifest, "rollout": asdict(rollout), "steadiness": steadiness}
        pipeline.info = replace(pipeline.info, manifest=manifest)
        self.pipeline = pipeline
        self.seconds = seconds

    def generate(self, request: str, /, *, seed: int) -> skyloom.Video:
        return self.pipeline.generate(request, seed=seed, seconds=self.seconds)


def measure(name: str, model: str, seconds: float, count: int) -> dict[str, float]:
    """Measure the drift of a rollout setting and write its contact sheet."""
    pipeline = skyloom.load(model)
    assert pipeline.info.rollout is not None
    settings = dict(OPTIONS.get(name, {}))
    steadiness = settings.pop("steadiness", pipeline.info.steadiness)
    rollout = replace(
        pipeline.info.rollout,
        **{key: int(value) if value >= 1 else value for key, value in settings.items()},
    )
    scale, fps = pipeline.autoencoder.scale, pipeline.info.fps
    fixed = Fixed(pipeline, rollout, steadiness, seconds)
    write_seconds(fixed.generate(SHEET_PROMPT, seed=1).frames, fps, OUT / f"{name}.png")
    windows = pipeline.plan(skyloom.Request(SHEET_PROMPT, seconds=seconds)).windows
    report = compare_drift(
        fixed,
        prompts_for(SMALL, count),
        load_probe(),
        load_atlas(Path(".atlas")),
        part=PART_SECONDS * fps,
        seams=[scale.video_frames(one.start) for one in windows[1:]],
    )
    return report.numbers


def write_seconds(
    frames: UInt8[Tensor, "t h w c"], fps: int, path: Path, columns: int = 12
) -> None:
    """A frame a second, in rows."""
    picked = frames[::fps][: 5 * columns].numpy()
    height, width = picked.shape[1:3]
    sheet = Image.new(
        "RGB", (columns * (width // 2 + 2), -(-len(picked) // columns) * (height // 2 + 2))
    )
    for index, frame in enumerate(picked):
        small = Image.fromarray(frame).resize((width // 2, height // 2), Image.Resampling.LANCZOS)
        sheet.paste(
            small, (index % columns * (width // 2 + 2), index // columns * (height // 2 + 2))
        )
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_curves(found: dict[str, dict[str, float]], path: Path) -> None:
    """One plot a measure: parts of the video from left to right, a line per option."""
    width, height, names = 420, 220, list(found)
    picture = Image.new("RGB", (2 * width, 3 * height + 16 * len(names)), "white")
    draw = ImageDraw.Draw(picture)
    for at, measure_name in enumerate(CURVES):
        left, top = at % 2 * width + 44, at // 2 * height + 22
        lines = {name: _curve(numbers, measure_name) for name, numbers in found.items()}
        values = [value for line in lines.values() for value in line]
        low, high = min(values), max(*values, min(values) + 1e-06)
        draw.text((left, top - 18), f"{measure_name} ({PART_SECONDS} s parts)", fill="black")
        draw.rectangle((left, top, left + width - 60, top + height - 44), outline="#999999")
        for value, y in ((high, top), (low, top + height - 44)):
            draw.text((left - 42, y - 6), f"{value:.3g}", fill="#555555")
        for colour, line in zip(COLOURS, lines.values(), strict=False):
            points = [
                (
                    left + index * (width - 60) / max(1, len(line) - 1),
                    top + (high - value) / (high - low) * (height - 44),
                )
                for index, value in enumerate(line)
            ]
            draw.line(points, fill=colour, width=2)
    for index, name in enumerate(names):
        y = 3 * height + 16 * index
        draw.rectangle((44, y + 4, 64, y + 8), fill=COLOURS[index % len(COLOURS)])
        draw.text((72, y), name, fill="black")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _curve(numbers: dict[str, float], measure_name: str) -> list[float]:
    parts = sum(key.endswith(", subject read") and key.startswith("part") for key in numbers)
    first = {"contrast": 1.0, "sharpness": 1.0, "speed": 1.0, "colour change": 0.0}
    return [
        numbers.get(f"part {part}, {measure_name}", first.get(measure_name, 0.0))
        for part in range(1, parts + 1)
    ]


def main() -> None:
    """Measure the chosen settings, merge with earlier results and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--model", default="diorama")
    parser.add_argument(
        "--only",
        nargs="*",
        default=list(OPTIONS),
        help="options, or a name of your own for --model",
    )
    given = parser.parse_args()
    torch.set_num_threads(2)
    OUT.mkdir(parents=True, exist_ok=True)
    kept = OUT / "drift.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for name in given.only:
        found[name] = measure(name, given.model, given.seconds, given.count)
        kept.write_text(json.dumps(found, indent=1, ensure_ascii=False))
        print(
            name,
            {
                key: round(value, 3)
                for key, value in found[name].items()
                if key.startswith(("part 12,", "seams"))
            },
        )
    draw_curves(
        {name: found[name] for name in (*OPTIONS, *found) if name in found}, OUT / "curves.png"
    )


if __name__ == "__main__":
    main()
