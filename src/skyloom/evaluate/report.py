"""What an evaluation found: rows of shares and numbers, written as Markdown, JSON and a sheet of pictures."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from skyloom.evaluate.metrics import Share

_TEXT_HEIGHT = 15
_GAP = 4


@dataclass(frozen=True)
class Row:
    """One share: in which group of prompts, what was asked, and where the videos came from."""

    group: str
    category: str
    source: str
    share: Share


@dataclass(frozen=True)
class Strip:
    """A few frames of one video with lines of text under them, for the sheet."""

    frames: UInt8[Tensor, "t h w c"]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Everything found; `about` says what was measured and how, `cases` holds one entry per video."""

    title: str
    about: dict[str, Any]
    rows: tuple[Row, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    cases: tuple[dict[str, Any], ...] = ()
    strips: tuple[Strip, ...] = ()

    def share(self, group: str, category: str, source: str) -> Share:
        """One share by name. Raises KeyError when it was not measured."""
        for row in self.rows:
            if (row.group, row.category, row.source) == (group, category, source):
                return row.share
        raise KeyError((group, category, source))

    def as_table(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON; what is not a number becomes None."""
        return {
            "title": self.title,
            "about": self.about,
            "rows": [{**asdict(row), "share": _plain(asdict(row.share))} for row in self.rows],
            "numbers": _plain(self.numbers),
            "cases": list(self.cases),
        }

    def as_markdown(self) -> str:
        """A table per group: categories down, sources across, "share ± standard error (cases)"."""
        lines = [f"# {self.title}", ""]
        lines += [f"- {name}: {value}" for name, value in self.about.items()]
        for group in dict.fromkeys(row.group for row in self.rows):
            rows = [row for row in self.rows if row.group == group]
            sources = list(dict.fromkeys(row.source for row in rows))
            found = {(row.category, row.source): row.share for row in rows}
            lines += [
                "",
                f"## {group}",
                "",
                f"| | {' | '.join(sources)} |",
                "|---" * (len(sources) + 1) + "|",
            ]
            for category in dict.fromkeys(row.category for row in rows):
                cells = [_cell(found.get((category, source))) for source in sources]
                lines.append(f"| {category} | {' | '.join(cells)} |")
        if self.numbers:
            lines += ["", "## Numbers", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {value:.4g} |" for name, value in self.numbers.items()]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> list[Path]:
        """Write report.md, report.json and, where there are pictures, sheet.png."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "report.md", folder / "report.json"]
        paths[0].write_text(self.as_markdown())
        paths[1].write_text(json.dumps(self.as_table(), indent=1))
        if self.strips:
            paths.append(folder / "sheet.png")
            draw_sheet(self.strips).save(paths[-1])
        return paths


def _cell(share: Share | None) -> str:
    if share is None or share.cases == 0:
        return "-"
    error = "" if math.isnan(share.error) else f" ± {share.error:.3f}"
    return f"{share.value:.3f}{error} ({share.cases})"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def draw_sheet(strips: Sequence[Strip], columns: int = 2) -> Image.Image:
    """A picture with one strip of frames per video and its text below, in columns."""
    pictures = [_draw_strip(strip) for strip in strips]
    width = max(picture.width for picture in pictures) + _GAP
    height = max(picture.height for picture in pictures) + _GAP
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(pictures)), height * rows), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, ((index % columns) * width, (index // columns) * height))
    return sheet


def _draw_strip(strip: Strip) -> Image.Image:
    frames = rearrange(strip.frames, "t h w c -> h (t w) c").numpy()
    height, width = frames.shape[:2]
    picture = Image.new("RGB", (width, height + _TEXT_HEIGHT * len(strip.lines)), "white")
    picture.paste(Image.fromarray(np.ascontiguousarray(frames)), (0, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_TEXT_HEIGHT - 4)
    for index, line in enumerate(strip.lines):
        draw.text((2, height + index * _TEXT_HEIGHT), line, fill="black", font=font)
    return picture
