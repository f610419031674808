"""The original Wan code (PyPI package wan22, Apache-2.0) on a CPU, as a reference for parity tests.

Its packages import CUDA-only code, so the modules are loaded alone: the packages are empty, and
flash attention is torch's attention. sys.modules and torch are restored after each import.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

_LOADED: dict[str, types.ModuleType] = {}


def load(name: str) -> types.ModuleType:
    """Import a module such as "wan.modules.model"; skip the test if wan22 is not installed."""
    if name in _LOADED:
        return _LOADED[name]
    spec = importlib.util.find_spec("wan")
    if spec is None or spec.origin is None:
        pytest.skip("wan22 is not installed (make setup installs it)")
    before = dict(sys.modules)
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: "cpu"
    try:
        sys.modules.update(_stubs(Path(spec.origin).parent))
        sys.modules.update({key: value for key, value in _LOADED.items() if key != name})
        _LOADED[name] = importlib.import_module(name)
    finally:
        torch.cuda.current_device = current_device
        for key in [key for key in sys.modules if key == "wan" or key.startswith("wan.")]:
            del sys.modules[key]
        sys.modules.update({key: value for key, value in before.items() if key.startswith("wan")})
    return _LOADED[name]


def _stubs(root: Path) -> dict[str, types.ModuleType]:
    """Empty packages, and attention in fp32 on the CPU."""
    stubs: dict[str, types.ModuleType] = {}
    for name in ("wan", "wan.modules", "wan.utils"):
        stubs[name] = types.ModuleType(name)
        stubs[name].__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    attention = types.ModuleType("wan.modules.attention")
    attention.flash_attention = _attention
    attention.attention = _attention
    stubs["wan.modules.attention"] = attention
    return stubs


def _attention(q, k, v, q_lens=None, k_lens=None, **_):
    mask = None
    if k_lens is not None:
        lengths = torch.as_tensor(k_lens)[:, None]
        mask = (torch.arange(k.shape[1])[None] < lengths)[:, None, None, :]
        mask = None if bool(mask.all()) else mask
    heads = (part.transpose(1, 2) for part in (q, k, v))
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    return mixed.transpose(1, 2)
