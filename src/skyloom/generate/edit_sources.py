"""Open the source videos of an edit at the model's frame rate and size, and its mask."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from skyloom.core.errors import RequestError
from skyloom.core.types import VideoShape
from skyloom.generate.edit_spec import Edit
from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.media.masks import Mask, feather, open_mask, parse_region
from skyloom.media.source import VideoSource, open_source
from skyloom.models.family import SizeRule


@dataclass(frozen=True, eq=False)
class EditSources:
    """Open source videos of an edit.

    `mask` marks the pixels of the first one that may change; `feather` is the width of its soft
    edge in pixels.
    """

    sources: tuple[VideoSource, ...]
    mask: Mask | None = None
    feather: int = 0

    def soft_mask(self, start: int, stop: int) -> Float[Tensor, "t h w"]:
        """Share of the generated picture in each pixel of frames [start, stop) of the source."""
        assert self.mask is not None
        return feather(self.mask.read(start, stop), self.feather)

    @property
    def notices(self) -> tuple[str, ...]:
        """One sentence per conversion of a source."""
        return tuple(
            f"{source.path}: {notice}." for source in self.sources for notice in source.notices
        )


def open_edit_sources(
    edit: Edit, fps: int, sizes: SizeRule, size: tuple[int, int] | None = None
) -> EditSources:
    """Open and check the files of an edit at a rate and a size (height, width).

    Without `size`, it is the one of the model's `sizes` nearest to the first video's. Raises
    MediaError for an unreadable file, RequestError for an empty mask and, with `strict`, for a
    video that would have to be resampled.
    """
    if not EDIT_VERBS[edit.verb].resamples_sources:
        return EditSources(tuple(open_source(path) for path in edit.videos))
    opened = [open_source(path, fps=Fraction(fps)) for path in edit.videos]
    if size is None:
        width, height = sizes.nearest(opened[0].width, opened[0].height)
    else:
        height, width = size
    sources = tuple(source.resized(height, width) for source in opened)
    conversions = list(_conversions(sources))
    if conversions and edit.strict:
        raise RequestError(
            conversions[0],
            hint=f"Convert it to {width}x{height} at {fps} fps, or leave out --strict.",
        )
    if edit.verb != "inpaint":
        return EditSources(sources)
    shape = VideoShape(sources[0].frames, height, width)
    region = parse_region(edit.region) if edit.region is not None else Path(str(edit.mask))
    mask = open_mask(region, shape, Fraction(fps))
    _check_mask(mask, shape.frames)
    return EditSources(sources, mask, edit.value("feather"))


def _conversions(sources: tuple[VideoSource, ...]) -> Iterator[str]:
    """One sentence per source that is resampled or resized."""
    for source in sources:
        for notice in source.notices:
            if notice.startswith(("resampled", "resized")):
                yield f"{source.path} would have to be {notice}."


def _check_mask(mask: Mask, frames: int, run: int = 64) -> None:
    """Raise RequestError if no pixel of any frame is set."""
    for start in range(0, frames, run):
        if bool(mask.read(start, min(start + run, frames)).any()):
            return
    raise RequestError(
        "The mask is empty: nothing would change.", hint="White is changed, black is kept."
    )
