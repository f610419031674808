"""Open weights as other tools write them: safetensors (one file, shards, folders) and GGUF.

Tensors are read one at a time; matrices in 8 bits stay in 8 bits (`models/quantized.py`). Headers
are checked before anything else is read: every tensor lies in its file and no two overlap.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from skyloom.core.errors import CheckpointError
from skyloom.models.file_bytes import FETCH_AGAIN, FileBytes, Header, ReadMode, shown
from skyloom.models.gguf_header import MAGIC, read_gguf_header
from skyloom.models.quantized import Weight
from skyloom.models.safetensors_header import as_table, parse_table, read_safetensors_header
from skyloom.models.weight_formats import Entry, RawTensor, strip_prefix, weights_of

INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")
Twin = Callable[[str], str | None]

_MAX_INDEX_BYTES = 16 * 2**20
_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.safetensors")
_FILE_NAME = re.compile(r"[^/\\:\x00-\x1f]+\.safetensors")
_USUAL = ("diffusion_pytorch_model", "model")
_BEGINNINGS = {
    b"PK\x03\x04": "a pickle in a zip archive",
    b"\x80": "a pickle",
    b"version https://git-lfs": "a Git LFS pointer instead of the file",
    b"<": "a web page instead of the file",
}


class WeightFiles:
    """Tensors of one or several files by name, read one at a time; `open_weights` makes it.

    Prefixes of ComfyUI (`model.diffusion_model.`) are not part of the names. shapes: of the
    dequantized tensors. dtypes: as stored, for example "BF16", "F8_E4M3", "Q8_0". metadata: texts
    of the safetensors headers, or keys and values of GGUF.
    """

    def __init__(self, entries: Mapping[str, Entry], metadata: Mapping[str, Any]) -> None:
        self._entries = entries
        self.metadata = metadata
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in entries.items()}

    def read(self, name: str) -> Weight:
        """Read a tensor; a matrix in 8 bits as QuantizedWeight. Raises CheckpointError.

        A tensor may lie in the mapped file (a write to it stays in memory), a QuantizedWeight
        never does: it is loaded without a further copy.
        """
        return self._entries[name].read()


@contextmanager
def open_weights(
    paths: Path | Sequence[Path], *, read: ReadMode = "auto", twin: Twin | None = None
) -> Generator[WeightFiles]:
    """Open a file, an index, a shard, a folder with one set of weights, or several files.

    read: "mmap" maps the files, "copy" reads them, "auto" copies from network drives, where
    mapping is slow. twin: names the safetensors file that has the weights of a pickle file, given
    its name. Raises CheckpointError for what is damaged, incomplete or not read, by its name.
    """
    given = [paths] if isinstance(paths, Path) else list(paths)
    if not given:
        raise CheckpointError("paths must name at least one file.")
    with ExitStack() as stack:
        tensors: dict[str, RawTensor] = {}
        metadata: dict[str, Any] = {}
        for path in given:
            for part, expected in weight_paths(path, twin).items():
                file = stack.enter_context(FileBytes(part, read))
                header = _header(file, twin)
                _check_index(part, header, expected)
                _add(tensors, file, header)
                metadata.update(header.metadata)
        yield WeightFiles(weights_of(tensors, metadata, given[0]), metadata)


def weight_paths(path: Path, twin: Twin | None = None) -> dict[Path, frozenset[str] | None]:
    """Return the files that a path stands for, with the names that an index promises for each.

    path: a file, an index, one of several shards, or a folder with one set of weights. Raises
    CheckpointError for a missing shard, or a folder with none or several sets.
    """
    if path.is_dir():
        path = _in_folder(path, twin)
    if path.name.endswith(INDEX_SUFFIX):
        return dict(_indexed(path))
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return {path: None}
    index = path.with_name(match["stem"] + INDEX_SUFFIX)
    if index.is_file():
        return dict(_indexed(index))
    count = int(match["count"])
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return dict.fromkeys(_existing(path.parent, names), None)


def _in_folder(folder: Path, twin: Twin | None) -> Path:
    """Return the index or file of the only set of weights in a folder."""
    names = sorted(path.name for path in folder.iterdir())
    sets: dict[str, str] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        stem = match["stem"] if match else name.removesuffix(".safetensors").removesuffix(".gguf")
        if name.endswith(INDEX_SUFFIX):
            sets[name.removesuffix(INDEX_SUFFIX)] = name
        elif name.endswith((".safetensors", ".gguf")):
            sets.setdefault(stem, name)
    chosen = next((sets[stem] for stem in _USUAL if stem in sets), None)
    if chosen is None and len(sets) == 1:
        (chosen,) = sets.values()
    if chosen is not None:
        return folder / chosen
    if sets:
        listed = ", ".join(sorted(sets.values())[:3])
        raise CheckpointError(
            f"{folder} holds {len(sets)} sets of weights ({listed}).", hint="Name one file."
        )
    for name in names:
        if name.endswith(PICKLE_SUFFIXES):
            raise _pickle(folder / name, twin)
    raise CheckpointError(f"{folder} holds no weights (*.safetensors or *.gguf).")


def _indexed(index: Path) -> dict[Path, frozenset[str]]:
    """Return the files of an index with the names of their tensors."""
    try:
        size = index.stat().st_size
        table = parse_table(index.read_bytes()) if size <= _MAX_INDEX_BYTES else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} is no valid index.", hint=FETCH_AGAIN) from error
    names = as_table(table.get("weight_map"))
    if not names:
        raise CheckpointError(f"{index} is no valid index.", hint=FETCH_AGAIN)
    by_file: dict[str, set[str]] = {}
    for name, file in names.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise CheckpointError(
                f"{index} names {shown(file)}, which is no safetensors file beside it."
            )
        by_file.setdefault(file, set()).add(name)
    paths = _existing(index.parent, sorted(by_file))
    for path in paths:
        if not _lies_beside(path, index):
            raise CheckpointError(
                f"{index} names {shown(path.name)}, a link to outside of its folder.",
                hint="Name the files one by one if that is intended.",
            )
    return {path: frozenset(by_file[path.name]) for path in paths}


def _existing(folder: Path, names: Sequence[str]) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} files ({shown(missing[0])}).",
            hint="The download is not complete.",
        )
    return [folder / name for name in names]


def _lies_beside(path: Path, index: Path) -> bool:
    """Whether a file is in the index's folder, or in the store of the Hugging Face cache."""
    target = path.resolve()
    folders = [index.parent.resolve()]
    folders += [
        (parent.parent / "blobs").resolve()
        for parent in index.absolute().parents
        if parent.name == "snapshots"
    ]
    return any(target.is_relative_to(folder) for folder in folders)


def _header(file: FileBytes, twin: Twin | None) -> Header:
    """Read the header of a file, told by its first bytes; refuse what is no weight file."""
    beginning = file.head(0, min(file.size, max(map(len, _BEGINNINGS))))
    if beginning.startswith(MAGIC):
        return read_gguf_header(file)
    if file.path.name.lower().endswith(PICKLE_SUFFIXES):
        raise _pickle(file.path, twin)
    for start, kind in _BEGINNINGS.items():
        is_header = beginning[8:9] == b"{"
        if beginning.startswith(start) and not is_header:
            if "pickle" in kind:
                raise _pickle(file.path, twin)
            raise CheckpointError(f"{file.path} is {kind}.", hint=FETCH_AGAIN)
    return read_safetensors_header(file)


def _check_index(path: Path, header: Header, expected: frozenset[str] | None) -> None:
    different = [] if expected is None else sorted(header.tensors.keys() ^ expected)
    if not different:
        return
    raise CheckpointError(
        f"{path} and its index differ in {len(different)} tensors ({shown(different[0])}).",
        hint="They belong to different versions; fetch both again.",
    )


def _add(tensors: dict[str, RawTensor], file: FileBytes, header: Header) -> None:
    for name, stored in header.tensors.items():
        plain = strip_prefix(name)
        if plain in tensors:
            other = tensors[plain].file.path.name
            raise CheckpointError(
                f"{file.path} has the tensor {shown(name)}, which is also in {other}."
            )
        tensors[plain] = RawTensor(file, stored)


def _pickle(path: Path, twin: Twin | None) -> CheckpointError:
    other = None if twin is None else twin(path.name)
    return CheckpointError(
        f"{path} is a pickle, which may run code when it is read.",
        hint="Take the safetensors file of the same weights"
        + (f": {other}." if other else ", as ComfyUI and diffusers use."),
    )
