"""Contact sheets: a strip of frames per video with a title above."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from skyloom.core.errors import MediaError
from skyloom.media.write import PICTURE_SUFFIXES, atomic_output, check_target

_TITLE_HEIGHT = 14  # pixels


def write_sheet(
    rows: Sequence[tuple[str, UInt8[Tensor, "t h w c"]]],
    path: Path,
    moments: int = 5,
    columns: int = 1,
) -> Path:
    """Write a PNG with `moments` frames per (title, frames) row, `columns` videos side by side.

    Raises what `check_target` raises.
    """
    if not rows:
        raise MediaError("rows must not be empty.", hint="Give one or more videos.")
    check_target(path, PICTURE_SUFFIXES)
    height = max(frames.shape[1] for _, frames in rows)
    width = max(frames.shape[2] for _, frames in rows)
    cell_height = height + _TITLE_HEIGHT + 2
    cell_width = moments * (width + 2) + 6
    lines = math.ceil(len(rows) / columns)
    sheet = Image.new("RGB", (columns * cell_width, lines * cell_height), (24, 24, 28))
    draw = ImageDraw.Draw(sheet)
    for index, (title, frames) in enumerate(rows):
        left = index % columns * cell_width
        top = index // columns * cell_height
        draw.text((left + 2, top + 1), title[: cell_width // 6], fill=(235, 235, 235))
        numbers = torch.linspace(0, len(frames) - 1, moments).round().long()
        for column, frame in enumerate(frames[numbers].cpu().numpy()):
            position = (left + column * (width + 2), top + _TITLE_HEIGHT)
            sheet.paste(Image.fromarray(frame), position)
    with atomic_output(path) as temporary:
        sheet.save(temporary, "PNG")
    return path
