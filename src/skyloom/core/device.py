"""Which device and number format to work in, and what memory is left."""

import resource
import sys

import torch

from skyloom.core.errors import ConfigError


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or the best one present."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is not a device.", hint="Use cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("This machine has no CUDA device.", hint="Use --device cpu.")
    return device


def choose_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """The named dtype, or bf16 where the device multiplies it natively, else fp32."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name is not None:
        if name not in names:
            raise ConfigError(f"{name!r} is not a dtype.", hint=f"Use one of {', '.join(names)}.")
        return names[name]
    if device.type == "cuda":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
    return torch.bfloat16 if native else torch.float32


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
