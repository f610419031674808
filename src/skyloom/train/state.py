"""Training state on disk: weights, average, optimizer and step in one safetensors file.

Random numbers come from generators derived from (seed, step), so the step number is the whole state
of the randomness and a resumed run equals an uninterrupted one.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from skyloom.core.errors import CheckpointError
from skyloom.core.files import atomic_path
from skyloom.train.ema import Ema

STATE_FILE = "state.safetensors"
_ADAMW_KEYS = {"step", "exp_avg", "exp_avg_sq"}


def save_state(
    folder: Path, module: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, step: int
) -> Path:
    """Write the state after `step` optimizer steps, replacing the file atomically."""
    tensors = {f"model/{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in ema.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    path = folder / STATE_FILE
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata={"state": json.dumps({"step": step})})
    return path


def load_state(folder: Path, module: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer) -> int:
    """Restore a saved state and return its step. Raises CheckpointError if it does not fit."""
    path = folder / STATE_FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step = int(json.loads(file.metadata()["state"])["step"])
        module.load_state_dict(_under(tensors, "model/"))
        ema.load_state_dict(_under(tensors, "ema/"))
        saved = optimizer.state_dict()
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, "optimizer/").items():
            index, key = name.split("/")
            states.setdefault(int(index), {})[key] = value
        for state in states.values():
            if state.keys() != _ADAMW_KEYS:
                raise ValueError(
                    f"optimizer state must be AdamW's {sorted(_ADAMW_KEYS)}, got {sorted(state)}"
                )
        optimizer.load_state_dict({"state": states, "param_groups": saved["param_groups"]})
        _match_layouts(optimizer)
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not fit this recipe ({error}).",
            hint="Use the recipe that wrote it, or a new --run.",
        ) from error
    return step


@torch.no_grad()
def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the strides of their parameters, which the fused optimizer requires."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
