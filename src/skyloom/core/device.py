"""Choose torch device and dtype; measure memory."""

import resource
import sys

import torch

from skyloom.core.errors import ConfigError


def choose_device(name: str | None = None) -> torch.device:
    """Return the named device, or CUDA if available, else the CPU. Raises ConfigError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"The device must be cpu or cuda, got {name!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("This machine has no CUDA device.", hint="Use --device cpu.")
    return device


def choose_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """Return the named dtype, or bf16 if the device multiplies it natively, else fp32."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name is not None:
        if name not in names:
            raise ConfigError(f"The dtype must be one of {', '.join(names)}, got {name!r}.")
        return names[name]
    if device.type == "cuda":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
    return torch.bfloat16 if native else torch.float32


def free_device_memory(device: torch.device) -> int:
    """Return the free bytes of a CUDA device; what torch holds without using it is free."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def peak_memory_bytes() -> int:
    """Return the peak resident set size of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
