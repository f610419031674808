"""The lineage of a video: what it was made from, and that from what, as far as the files are at hand.

A receipt names its parents by the digests of their files; which files these are is found by looking.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from skyloom.core.errors import MediaError, SkyloomError
from skyloom.core.files import sha256_file
from skyloom.generate.receipt import Receipt, read_receipt

_SHORT = 12
_DEEPEST = 50
_KINDS = {".mp4", ".webm", ".mkv", ".gif", ".mov", ".avi", ".png", ".jpg", ".jpeg", ".webp"}


def draw_lineage(file: Path, among: Sequence[Path]) -> Iterator[str]:
    """A line for a video and, below it, indented, one for each parent that its receipt names.

    Parents are found by digest in the folders `among`; those that are not there are named by it. Raises MediaError for
    a file that holds no receipt, or a folder that cannot be read.
    """
    yield f"{file.name}  {_said(read_receipt(file))}"
    yield from _parents(file, _by_digest(among), "", _DEEPEST)


def _parents(file: Path, known: Mapping[str, Path], indent: str, deeper: int) -> Iterator[str]:
    try:
        receipt = read_receipt(file)
    except SkyloomError:  # a video from outside, or a picture: it has no parents
        return
    for index, parent in enumerate(receipt.parents):
        last = index == len(receipt.parents) - 1
        branch, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        found = known.get(parent.sha256)
        if found is None:
            yield f"{indent}{branch}{parent.sha256[:_SHORT]}  {parent.role} of {parent.verb}, not found"
            continue
        yield f"{indent}{branch}{found.name}  {parent.role} of {parent.verb}{_origin(found)}"
        if deeper:
            yield from _parents(found, known, indent + below, deeper - 1)


def _origin(file: Path) -> str:
    try:
        return f": {_said(read_receipt(file))}"
    except SkyloomError:
        return ""


def _said(receipt: Receipt) -> str:
    """The verb and the prompt."""
    edit = receipt.request.edit
    verb = "generate" if edit is None else edit.verb
    return " ".join(filter(None, (verb, receipt.request.prompt and f'"{receipt.request.prompt}"')))


def _by_digest(folders: Sequence[Path]) -> dict[str, Path]:
    """The videos and pictures of some folders by their digests."""
    try:
        paths = [
            path
            for folder in folders
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in _KINDS
        ]
        return {sha256_file(path): path for path in paths if path.is_file()}
    except OSError as error:
        raise MediaError(
            f"{error.filename} cannot be read ({error.strerror}).", hint="Check --among."
        ) from error
