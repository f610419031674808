"""Remove local paths from what leaves this host: messages to clients, job errors and receipts.

A file of a request is stored under its sha256 in a worker's folder. Messages name it by the API
field in which the client sent it, like "video" or "storyboard[1].image"; the request inside a
receipt keeps the file name without its folder.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

_ASSET = re.compile(r"asset:([0-9a-f]{64})\.\w+")
_INPUT = re.compile(r"[^\s'\"(]*\b([0-9a-f]{64})\.\w+")
_FOLDERS = re.compile(r"(?<![\w.:/<])/(?!v1/)(?:[^\s/]+/)+")
_API_NAMES = {"image": "input_reference", "cards": "storyboard"}  # Request field: API field
# A list of one item is sent in another field; a lone card is an input_reference with a strength.
_API_NAMES_OF_ONE = {"storyboard": "", "videos": "video"}


def without_folders(text: str) -> str:
    """Remove folders from local paths in a text; API paths ("/v1/...") stay."""
    return _FOLDERS.sub("", text)


def without_paths(text: str, request: Mapping[str, Any], data: Path | None = None) -> str:
    """Replace the request's files by their API fields and strip the folders of other paths.

    `data` is the server's data folder, which is removed as a prefix first.
    """
    fields = dict(_files(request, ""))
    if data is not None:
        text = text.replace(str(data.absolute()), "")
    return without_folders(_INPUT.sub(lambda found: fields.get(found[1], "A file"), text)).strip()


def clean_receipt(receipt: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Remove local paths from a job's receipt; idempotent.

    Its request keeps file names without folders, its notices name API fields.
    """
    files = dict(_files(request, ""))
    cleaned = {
        key: _map_text(value, lambda text: _name_by_field(text, files))
        for key, value in receipt.items()
    }
    if "request" in receipt:
        cleaned["request"] = _map_text(
            receipt["request"], lambda text: _without_folder(text, files)
        )
    notes = cleaned.get("notes")
    if isinstance(notes, Mapping) and "notices" in notes:
        notices = _map_text(notes["notices"], without_folders)
        cleaned["notes"] = {**cast("Mapping[str, Any]", notes), "notices": notices}
    return cleaned


def _without_folder(text: str, files: Mapping[str, str]) -> str:
    """The file name of a path to a file of the request; any other text unchanged."""
    found = _INPUT.fullmatch(text)
    return Path(text).name if found is not None and found[1] in files else text


def _name_by_field(text: str, files: Mapping[str, str]) -> str:
    return _INPUT.sub(lambda found: files.get(found[1], found[0]), text)


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string in nested plain values."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key: _map_text(one, change) for key, one in cast("Mapping[str, Any]", value).items()
        }
    if isinstance(value, Sequence):
        return [_map_text(one, change) for one in cast("Sequence[Any]", value)]
    return value


def _files(value: Any, field: str) -> Iterator[tuple[str, str]]:
    """Yield the sha256 and the API field of every file in a request."""
    if isinstance(value, Mapping):
        for name, one in cast("Mapping[str, Any]", value).items():
            in_card = field.startswith("storyboard")
            yield from _files(one, f"{field}.{name}" if in_card else _API_NAMES.get(name, name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, one in enumerate(value):
            alone = len(value) == 1
            name = _API_NAMES_OF_ONE.get(field, field) if alone else f"{field}[{index}]"
            yield from _files(one, name)
    elif isinstance(value, str) and (found := _ASSET.fullmatch(value)):
        yield found[1], field
