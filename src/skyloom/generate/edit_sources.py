"""The sources of an edit, opened: videos at the model's own rate and size, and what of them may change."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from skyloom.core.errors import RequestError
from skyloom.core.types import VideoShape
from skyloom.generate.edit_spec import Edit
from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.media.masks import Mask, open_mask, parse_region
from skyloom.media.source import Source, open_source


@dataclass(frozen=True, eq=False)
class Footage:
    """The sources, where `mask` (of the first one) allows a change, and how softly it begins at its edge, in pixels."""

    sources: tuple[Source, ...]
    mask: Mask | None = None
    softness: int = 0

    @property
    def notices(self) -> tuple[str, ...]:
        """What was done to the sources, a sentence each."""
        return tuple(
            f"{source.path}: {notice}." for source in self.sources for notice in source.notices
        )


def open_footage(edit: Edit, fps: int, height: int, width: int) -> Footage:
    """Open and check an edit's files. Raises MediaError for what cannot be read, RequestError for a mask or region that
    masks nothing and, with `strict`, for videos of another rate or size than the model's."""
    if EDIT_VERBS[edit.verb].is_filter:
        return Footage((open_source(edit.videos[0]),))
    sources = tuple(
        open_source(path, fps=Fraction(fps), size=(height, width)) for path in edit.videos
    )
    changed = list(_changes(sources))
    if changed and edit.strict:
        raise RequestError(
            changed[0], hint=f"Bring it to {width}x{height} at {fps} fps, or leave out --strict."
        )
    if edit.verb != "inpaint":
        return Footage(sources)
    shape = VideoShape(sources[0].frames, height, width)
    region = parse_region(edit.region) if edit.region is not None else Path(str(edit.mask))
    mask = open_mask(region, shape, Fraction(fps))
    _check_mask(mask, shape.frames)
    return Footage(sources, mask, edit.value("feather"))


def _changes(sources: tuple[Source, ...]) -> Iterator[str]:
    for source in sources:
        for notice in source.notices:
            if notice.startswith(("resampled", "resized")):
                yield f"{source.path} would have to be {notice}."


def _check_mask(mask: Mask, frames: int, run: int = 64) -> None:
    for start in range(0, frames, run):
        if bool(mask.read(start, min(start + run, frames)).any()):
            return
    raise RequestError(
        "The mask is empty: nothing would change.", hint="White is changed, black is kept."
    )
