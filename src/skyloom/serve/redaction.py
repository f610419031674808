"""No path of this machine in what leaves it: sentences to clients, errors of jobs, and receipts.

A file that a request names lies under its sha256 in a worker's folder. Clients know it by the field that they gave it
in, so a sentence says "video" or "storyboard[1].image" in its place; a receipt's request keeps the bare file name.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

_ASSET = re.compile(r"asset:([0-9a-f]{64})\.\w+")
_INPUT = re.compile(r"[^\s'\"(]*\b([0-9a-f]{64})\.\w+")
_FOLDERS = re.compile(r"(?<![\w.:/<])/(?!v1/)(?:[^\s/]+/)+")
_WIRE = {
    "image": "input_reference",
    "cards": "storyboard",
}  # what a Request calls it -> what clients do
_ALONE = {"storyboard": "", "videos": "video"}  # a first picture with a strength is a card


def without_folders(text: str) -> str:
    """A sentence in which files of this machine have names only. Paths of the API stay."""
    return _FOLDERS.sub("", text)


def without_paths(text: str, request: Mapping[str, Any], data: Path | None = None) -> str:
    """A sentence with fields for the files of a job's request, and no folders of other files; `data` is the folder of
    all that the server keeps."""
    fields = dict(_files(request, ""))
    if data is not None:
        text = text.replace(str(data.absolute()), "")
    return without_folders(_INPUT.sub(lambda found: fields.get(found[1], "A file"), text)).strip()


def clean_receipt(receipt: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """A receipt of a job as it may leave this machine: its request names files without folders, its notices say the
    fields of the job's request. Cleaning twice changes nothing more."""
    files = dict(_files(request, ""))
    cleaned = {
        key: _each_text(value, lambda text: _by_field(text, files))
        for key, value in receipt.items()
    }
    if "request" in receipt:
        cleaned["request"] = _each_text(receipt["request"], lambda text: _bare(text, files))
    notes = cleaned.get("notes")
    if isinstance(notes, Mapping) and "notices" in notes:
        notices = _each_text(notes["notices"], without_folders)
        cleaned["notes"] = {**cast("Mapping[str, Any]", notes), "notices": notices}
    return cleaned


def _bare(text: str, files: Mapping[str, str]) -> str:
    """The name of a file of the request; any other text as it is."""
    found = _INPUT.fullmatch(text)
    return Path(text).name if found is not None and found[1] in files else text


def _by_field(text: str, files: Mapping[str, str]) -> str:
    return _INPUT.sub(lambda found: files.get(found[1], found[0]), text)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """The same plain values with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key: _each_text(one, change) for key, one in cast("Mapping[str, Any]", value).items()
        }
    if isinstance(value, Sequence):
        return [_each_text(one, change) for one in cast("Sequence[Any]", value)]
    return value


def _files(value: Any, field: str) -> Iterator[tuple[str, str]]:
    """The sha256 of every file that a request names, and its field as clients call it."""
    if isinstance(value, Mapping):
        for name, one in cast("Mapping[str, Any]", value).items():
            yield from _files(
                one, f"{field}.{name}" if field.startswith("storyboard") else _WIRE.get(name, name)
            )
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, one in enumerate(value):
            yield from _files(
                one, f"{field}[{index}]" if len(value) > 1 else _ALONE.get(field, field)
            )
    elif isinstance(value, str) and (found := _ASSET.fullmatch(value)):
        yield found[1], field
