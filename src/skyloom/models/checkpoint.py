"""Model folders: safetensors parts with their config in the metadata, and a manifest of hashes.

A part is `PART.safetensors`, or `PART-00001-of-00002.safetensors` and so on when it is large.
Loading is strict: a missing, truncated, corrupt, extra or misshapen tensor raises CheckpointError.
A network is built on the device `meta` and its tensors are read one by one, so that the peak of
memory is the network plus one tensor.
"""

import json
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skyloom.core.config import from_table
from skyloom.core.errors import CheckpointError
from skyloom.core.files import atomic_path, sha256_file
from skyloom.core.hash_cache import HashCache
from skyloom.models.quantized import (
    QuantizedWeight,
    Weight,
    can_quantize,
    dense,
    quantized_layer,
)
from skyloom.models.registry import (
    MANIFEST_FILE,
    REPAIR,
    read_manifest,
    repair_hint,
    weight_files,
)

MAX_SHARD_BYTES = 15 * 2**20
_SCALE = ".scale"
_RANDOM = ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_")
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class TensorSource(Protocol):
    """Tensors by name that are read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        ...

    def read(self, name: str) -> Weight:
        """Read a tensor; a matrix in 8 bits may stay quantized."""
        ...


@dataclass(frozen=True)
class WeightRecipe:
    """How a network's tensor is made of stored ones.

    convert: takes the tensors `names`, of equal shape if there are several, and joins them along
    the rows, in this order; it may reorder rows within each, and reshape. Columns keep their order.
    """

    names: tuple[str, ...]
    convert: Callable[..., Weight]


class PartReader:
    """Reads a part of a model folder one tensor at a time; `open_part` makes it.

    Tensors in int8 (`to_int8`) are dequantized to fp32; their scales are not listed.
    """

    def __init__(self, files: Mapping[Path, Any], metadata: Mapping[str, str]) -> None:
        self.metadata = metadata
        self._paths = list(files)
        self._files = {name: path for path, file in files.items() for name in file.keys()}  # noqa: SIM118
        self._handles = files
        self._scaled = {
            name.removesuffix(_SCALE)
            for name in self._files
            if name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._files
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all stored tensors, scales included."""
        return tuple(self._files)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        scales = {name + _SCALE for name in self._scaled}
        return {
            name: tuple(self._handles[path].get_slice(name).get_shape())
            for name, path in self._files.items()
            if name not in scales
        }

    def read(self, name: str) -> Tensor:
        """Read a tensor. Raises CheckpointError for a damaged file."""
        value = self.read_stored(name)
        return (
            value
            if name not in self._scaled
            else _dequantize(value, self.read_stored(name + _SCALE))
        )

    def config(self, config_class: type[T]) -> T:
        """Read the config in the metadata. Raises CheckpointError if there is none."""
        if "config" not in self.metadata:
            raise CheckpointError(f"{self._paths[0]} has no config in its metadata.", hint=REPAIR)
        return from_table(json.loads(self.metadata["config"]), config_class, str(self._paths[0]))

    def read_stored(self, name: str) -> Tensor:
        """Read a tensor as it is stored, not dequantized. Raises CheckpointError."""
        path = self._files[name]
        try:
            return self._handles[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error


def save_part(
    folder: Path,
    part: str,
    config: object,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write a part in files of at most `max_bytes`; cast floating tensors to `dtype` if given."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: _stored(value, dtype) for name, value in state.items()}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > max_bytes and shards[-1]:
            shards.append({})
            size = tensor.nbytes
        shards[-1][name] = tensor
    for old in _files(folder, part):
        old.unlink()
    header = {**(metadata or {}), "config": json.dumps(_plain(asdict(config)))}  # type: ignore[call-overload]
    paths: list[Path] = []
    for index, shard in enumerate(shards, 1):
        suffix = "" if len(shards) == 1 else f"-{index:05d}-of-{len(shards):05d}"
        path = folder / f"{part}{suffix}.safetensors"
        with atomic_path(path) as temporary:
            save_file(shard, temporary, metadata=header)
        paths.append(path)
    return paths


@contextmanager
def open_part(folder: Path, part: str) -> Generator[PartReader]:
    """Open a part for reading. Raises CheckpointError for incomplete or damaged files."""
    paths = _files(folder, part)
    if not paths:
        raise CheckpointError(f"{folder} has no weights for {part!r}.", hint=REPAIR)
    count = int(paths[0].stem.rsplit("-of-", 1)[1]) if "-of-" in paths[0].stem else 1
    if len(paths) != count:
        raise CheckpointError(
            f"{folder} must hold {count} files of {part!r}, got {len(paths)}.", hint=REPAIR
        )
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        for path in paths:
            try:
                handles[path] = stack.enter_context(cast(Any, safe_open(path, framework="pt")))
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from error
        yield PartReader(handles, handles[paths[-1]].metadata() or {})


def read_config(folder: Path, part: str, config_class: type[T]) -> T:
    """Read the config of a part, without tensors. Raises CheckpointError."""
    with open_part(folder, part) as reader:
        return reader.config(config_class)


def load_part(
    folder: Path, part: str, config_class: type[T]
) -> tuple[T, dict[str, Tensor], dict[str, str]]:
    """Read a whole part: config, tensors as stored, metadata.

    Raises CheckpointError for incomplete files.
    """
    with open_part(folder, part) as reader:
        state = {name: reader.read_stored(name) for name in reader.names}
        return reader.config(config_class), state, dict(reader.metadata)


def has_part(folder: Path, part: str) -> bool:
    """Whether a folder holds a file of the part."""
    return bool(_files(folder, part))


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights strictly: every tensor must be present, known and of the right shape."""
    _check_fit(module, {name: tuple(value.shape) for name, value in state.items()})
    module.load_state_dict(dict(state))


def build(
    make: Callable[[], M],
    source: TensorSource,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    skip: Iterable[str] = (),
) -> M:
    """Build a network on `meta` and read its weights one by one onto a device, strictly.

    dtype: passed to the network's method `place`, which chooses the precision and memory format of
    every layer; None keeps those of a new network. skip: names of tensors that are not its own.
    A linear layer or embedding whose weight the source gives quantized becomes a QuantizedLinear or
    QuantizedEmbedding; in other places the weight is dequantized.
    """
    meta = torch.device("meta")
    with meta, _SkipInitialisation():
        module = make().eval()
    if dtype is not None:
        cast(Any, module).place(meta, dtype)
    ignored = set(skip)
    _check_fit(module, {k: v for k, v in source.shapes.items() if k not in ignored})
    stored = module.state_dict().keys()
    owners: list[tuple[str, nn.Module]] = list(cast(Any, module).named_modules())
    for prefix, owner in owners:
        layer = _fill(owner, prefix, source, device, stored)
        if layer is not None:
            module.set_submodule(prefix, layer)
    return module


def _fill(
    owner: nn.Module,
    prefix: str,
    source: TensorSource,
    device: torch.device,
    stored: Collection[str],
) -> nn.Module | None:
    """Read a module's own tensors; return the layer that replaces it if its weight is quantized."""
    parameters = dict(owner.named_parameters(recurse=False))
    quantized: QuantizedWeight | None = None
    for name, empty in {**parameters, **dict(owner.named_buffers(recurse=False))}.items():
        full_name = f"{prefix}.{name}" if prefix else name
        if full_name not in stored:
            continue
        value = _read(source, full_name, empty, device)
        if isinstance(value, QuantizedWeight) and prefix and can_quantize(owner, name):
            quantized = value
            continue
        value = dense(value, empty.dtype)
        if name in parameters:
            value = nn.Parameter(value, requires_grad=empty.requires_grad)
        setattr(owner, name, value)
    return None if quantized is None else quantized_layer(owner, quantized)


def _read(source: TensorSource, name: str, empty: Tensor, device: torch.device) -> Weight:
    """Read a weight onto a device; a tensor gets the precision and strides of `empty`.

    The target is allocated before the tensor is read: the other way round, glibc's heap is left
    with a gap for every tensor, and the peak of memory is twice the network.
    """
    value = torch.empty_strided(empty.shape, empty.stride(), dtype=empty.dtype, device=device)
    weight = source.read(name)
    return weight.to(device) if isinstance(weight, QuantizedWeight) else value.copy_(weight)


class _SkipInitialisation(TorchFunctionMode):
    """Skips random initialisation: on `meta` it has no effect, but imports torch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return the tensor unchanged, or call any other function."""
        named: dict[str, Any] = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def write_manifest(folder: Path, info: Mapping[str, Any]) -> Path:
    """Write `info` and the sha256 of every weights file; return the path."""
    hashes = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**info, "files": hashes}, indent=1) + "\n")
    return path


def verify_manifest(folder: Path, *, trust_cache: bool = False) -> dict[str, Any]:
    """Read the manifest and check every file's hash. Raises CheckpointError.

    trust_cache: use the remembered hash of a file whose size, mtime and inode have not changed.
    """
    manifest = read_manifest(folder)
    hashes = HashCache()
    try:
        for file in weight_files(folder, manifest):
            if not file.path.exists():
                raise CheckpointError(f"{file.path} is missing.", hint=repair_hint(manifest))
            if trust_cache and file.is_unchanged():
                continue
            if hashes.sha256(file.path, trust=trust_cache) != file.sha256:
                raise CheckpointError(
                    f"{file.path} is corrupt: its hash differs.", hint=repair_hint(manifest)
                )
    finally:
        hashes.save()
    return manifest


def to_int8(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Quantize matrices to int8 with a scale per output row (`NAME.scale`); vectors to fp16."""
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.ndim == 1:
            stored[name] = value.half()
            continue
        rows = value.float().flatten(1)
        scale = rows.abs().amax(dim=1).clamp(min=1e-12) / 127
        stored[name] = (
            (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8).reshape(value.shape)
        )
        stored[f"{name}.scale"] = scale
    return stored


def from_int8(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dequantize to fp32, the inverse of `to_int8`; tensors without a scale are cast."""
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(_SCALE):
            continue
        scale = state.get(name + _SCALE)
        weights[name] = value.float() if scale is None else _dequantize(value, scale)
    return weights


def _dequantize(value: Tensor, scale: Tensor) -> Tensor:
    return value.float() * scale.float().reshape(-1, *[1] * (value.ndim - 1))


def _check_fit(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless names and shapes are those of the module's state."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    missing = sorted(expected.keys() - shapes.keys())
    extra = sorted(shapes.keys() - expected.keys())
    misshapen = sorted(
        name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]
    )
    if missing or extra or misshapen:
        named = ", ".join([*missing, *extra, *misshapen][:3])
        raise CheckpointError(
            f"Weights do not fit {type(module).__name__}: {len(missing)} missing, "
            f"{len(extra)} extra, {len(misshapen)} misshapen ({named}).",
            hint="They belong to another model or version.",
        )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({error}).", hint=REPAIR)


def _files(folder: Path, part: str) -> list[Path]:
    single = folder / f"{part}.safetensors"
    return (
        [single] if single.exists() else sorted(folder.glob(f"{part}-?????-of-?????.safetensors"))
    )


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = dtype is not None and value.is_floating_point()
    return value.detach().to("cpu", dtype if cast else value.dtype).contiguous()


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}
