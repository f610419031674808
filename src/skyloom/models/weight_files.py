"""Open weights as other tools write them: safetensors (one file, shards, folders) and GGUF.

Tensors are read one at a time; matrices in 8 bits stay in 8 bits (`models/quantized.py`). Headers
are checked before anything else is read: every offset lies in the file and no two tensors overlap.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from skyloom.models.quantized import Weight

ReadMode = Literal["auto", "mmap", "copy"]


class WeightFiles:
    """Tensors of one or several files by name, read one at a time; `open_weights` makes it.

    shapes: of the dequantized tensors. dtypes: as stored, for example "BF16", "F8_E4M3", "Q8_0".
    metadata: texts of the safetensors header, or keys and values of GGUF.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, Any]

    def read(self, name: str) -> Weight:
        """Read a tensor; a matrix in 8 bits as QuantizedWeight. Raises CheckpointError."""
        raise NotImplementedError


@contextmanager
def open_weights(
    paths: Path | Sequence[Path],
    *,
    read: ReadMode = "auto",
    twin: Callable[[str], str | None] | None = None,
) -> Generator[WeightFiles]:
    """Open a file, an index, a shard, a folder with one set of weights, or several files.

    read: "mmap" maps the files, "copy" reads them, "auto" copies from network drives, where
    mapping is slow. twin: names the safetensors file that has the weights of a pickle file, given
    its name. Raises CheckpointError for what is damaged, incomplete or not read, by its name.
    """
    raise NotImplementedError
