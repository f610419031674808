"""Model folders: safetensors parts with their config in the metadata, and a manifest of hashes.

A part is `PART.safetensors`, or `PART-00001-of-00002.safetensors` and so on when it is large.
Loading is strict: a missing, truncated, corrupt, extra or misshapen tensor raises CheckpointError.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from skyloom.core.config import from_table
from skyloom.core.errors import CheckpointError
from skyloom.core.files import atomic_path, sha256_file
from skyloom.models.registry import MANIFEST_FILE, REPAIR, read_manifest

MAX_SHARD_BYTES = 15 * 2**20
T = TypeVar("T")


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


def load_part(
    folder: Path, part: str, config_class: type[T]
) -> tuple[T, dict[str, Tensor], dict[str, str]]:
    """Read a part: config, tensors, metadata. Raises CheckpointError for incomplete files."""
    paths = _files(folder, part)
    if not paths:
        raise CheckpointError(f"{folder} has no weights for {part!r}.", hint=REPAIR)
    count = int(paths[0].stem.rsplit("-of-", 1)[1]) if "-of-" in paths[0].stem else 1
    if len(paths) != count:
        raise CheckpointError(
            f"{folder} must hold {count} files of {part!r}, got {len(paths)}.", hint=REPAIR
        )
    state: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        try:
            with cast(Any, safe_open(path, framework="pt")) as file:
                metadata = file.metadata() or {}
                state.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({error}).", hint=REPAIR) from error
    if "config" not in metadata:
        raise CheckpointError(f"{paths[0]} has no config in its metadata.", hint=REPAIR)
    return from_table(json.loads(metadata["config"]), config_class, str(paths[0])), state, metadata


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights strictly: every tensor must be present, known and of the right shape."""
    expected = module.state_dict()
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    misshapen = sorted(
        name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape
    )
    if missing or extra or misshapen:
        named = ", ".join([*missing, *extra, *misshapen][:3])
        raise CheckpointError(
            f"Weights do not fit {type(module).__name__}: {len(missing)} missing, "
            f"{len(extra)} extra, {len(misshapen)} misshapen ({named}).",
            hint="They belong to another model or version.",
        )
    module.load_state_dict(dict(state))


def write_manifest(folder: Path, info: Mapping[str, Any]) -> Path:
    """Write `info` and the sha256 of every weights file; return the path."""
    hashes = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**info, "files": hashes}, indent=1) + "\n")
    return path


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and check every file's hash. Raises CheckpointError."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing.", hint=REPAIR)
        if sha256_file(path) != expected:
            raise CheckpointError(f"{path} is corrupt: its hash differs.", hint=REPAIR)
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
        if name.endswith(".scale"):
            continue
        scale = state.get(f"{name}.scale")
        rows = value.float()
        weights[name] = (
            rows if scale is None else rows * scale.float().reshape(-1, *[1] * (value.ndim - 1))
        )
    return weights


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
