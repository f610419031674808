"""Draw the lineage of a video: the files it was made from, recursively.

A receipt names parents by the digests of their files; the files are searched in given folders.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from skyloom.core.errors import MediaError, SkyloomError
from skyloom.core.files import sha256_file
from skyloom.generate.receipt import Receipt, read_receipt

_DIGEST_CHARACTERS = 12
_MAX_DEPTH = 50
_SUFFIXES = {".mp4", ".webm", ".mkv", ".gif", ".mov", ".avi", ".png", ".jpg", ".jpeg", ".webp"}


def draw_lineage(file: Path, folders: Sequence[Path]) -> Iterator[str]:
    """Yield a line for a video and an indented line for each parent, recursively.

    Parents that are not in `folders` are named by their digest. Raises MediaError for a file
    without a receipt or an unreadable folder.
    """
    yield f"{file.name}  {_summary(read_receipt(file))}"
    yield from _draw_parents(file, _files_by_digest(folders), "", _MAX_DEPTH)


def _draw_parents(file: Path, known: Mapping[str, Path], indent: str, depth: int) -> Iterator[str]:
    try:
        receipt = read_receipt(file)
    except SkyloomError:  # a picture or a video without a receipt has no parents
        return
    for index, parent in enumerate(receipt.parents):
        last = index == len(receipt.parents) - 1
        branch, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        use = f"{parent.role} of {parent.verb}"
        found = known.get(parent.sha256)
        if found is None:
            yield f"{indent}{branch}{parent.sha256[:_DIGEST_CHARACTERS]}  {use}, not found"
            continue
        yield f"{indent}{branch}{found.name}  {use}{_origin(found)}"
        if depth:
            yield from _draw_parents(found, known, indent + below, depth - 1)


def _origin(file: Path) -> str:
    try:
        return f": {_summary(read_receipt(file))}"
    except SkyloomError:
        return ""


def _summary(receipt: Receipt) -> str:
    """The verb and the prompt."""
    edit = receipt.request.edit
    verb = "generate" if edit is None else edit.verb
    prompt = receipt.request.prompt
    return f'{verb} "{prompt}"' if prompt else verb


def _files_by_digest(folders: Sequence[Path]) -> dict[str, Path]:
    """The videos and pictures in the folders by their sha256."""
    try:
        paths = [
            path
            for folder in folders
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in _SUFFIXES
        ]
        return {sha256_file(path): path for path in paths if path.is_file()}
    except OSError as error:
        raise MediaError(
            f"{error.filename} cannot be read ({error.strerror}).", hint="Check --among."
        ) from error
