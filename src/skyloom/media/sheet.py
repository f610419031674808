"""Contact sheets: a row per video, moments of it from left to right, a line of text above."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from skyloom.core.errors import MediaError
from skyloom.media.write import PICTURE_SUFFIXES, check_target, placed

_LINE = 14


def write_sheet(
    rows: Sequence[tuple[str, UInt8[Tensor, "t h w c"]]],
    path: Path,
    moments: int = 5,
    columns: int = 1,
) -> Path:
    """Write a PNG with `columns` videos side by side, `moments` frames of each. Raises what `check_target` raises."""
    if not rows:
        raise MediaError("A contact sheet of no videos is empty.", hint="Give it one or more.")
    check_target(path, PICTURE_SUFFIXES)
    height, width = (
        max(frames.shape[1] for _, frames in rows),
        max(frames.shape[2] for _, frames in rows),
    )
    cell_height, cell_width = height + _LINE + 2, moments * (width + 2) + 6
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell_width, lines * cell_height), (24, 24, 28))
    draw = ImageDraw.Draw(sheet)
    for index, (title, frames) in enumerate(rows):
        left, top = index % columns * cell_width, index // columns * cell_height
        draw.text((left + 2, top + 1), title[: cell_width // 6], fill=(235, 235, 235))
        picked = torch.linspace(0, len(frames) - 1, moments).round().long()
        for column, frame in enumerate(frames[picked].cpu().numpy()):
            sheet.paste(Image.fromarray(frame), (left + column * (width + 2), top + _LINE))
    with placed(path) as partial:
        sheet.save(partial)
    return path
