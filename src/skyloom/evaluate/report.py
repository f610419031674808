"""Evaluation reports: shares and numbers as Markdown, JSON and a contact sheet."""

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
    """One share: group of prompts, category, and source of the videos."""

    group: str
    category: str
    source: str
    share: Share


@dataclass(frozen=True)
class Strip:
    """A few frames of one video with lines of text below, for the sheet."""

    frames: UInt8[Tensor, "t h w c"]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Results of an evaluation; about: its settings; cases: one entry per video."""

    title: str
    about: dict[str, Any]
    rows: tuple[Row, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    cases: tuple[dict[str, Any], ...] = ()
    strips: tuple[Strip, ...] = ()

    def share(self, group: str, category: str, source: str) -> Share:
        """Return one share by name. Raises KeyError if it was not measured."""
        for row in self.rows:
            if (row.group, row.category, row.source) == (group, category, source):
                return row.share
        raise KeyError((group, category, source))

    def as_table(self) -> dict[str, Any]:
        """Return everything but the pictures for JSON; NaN becomes None."""
        return {
            "title": self.title,
            "about": self.about,
            "rows": [{**asdict(row), "share": _plain(asdict(row.share))} for row in self.rows],
            "numbers": _plain(self.numbers),
            "cases": list(self.cases),
        }

    def as_markdown(self) -> str:
        """Format a table per group: categories down, sources across."""
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
        """Write report.md, report.json and, if there are pictures, sheet.png; return the paths."""
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
    """Draw one strip of frames per video with its text below, in columns."""
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
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(_TEXT_HEIGHT - 4)
    for index, line in enumerate(strip.lines):
        draw.text((2, height + index * _TEXT_HEIGHT), line, fill="black", font=font)
    return picture
