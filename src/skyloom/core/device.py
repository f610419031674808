"""Choose torch device and dtype; measure memory."""

import logging
import resource
import sys

import torch

from skyloom.core.errors import ConfigError

log = logging.getLogger(__name__)
DEVICES = "cpu, cuda, cuda:N or mps"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str | None = None) -> torch.device:
    """Return the named device, or CUDA if available, else the CPU.

    Apple's GPU (mps) is used only by name. Raises ConfigError for an unknown or missing device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"The device must be {DEVICES}, got {name!r:.40}.") from error
    if device.type == "cuda":
        _check_cuda(device)
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("This machine has no mps device.", hint="Use --device cpu.")
    elif device.type != "cpu":
        raise ConfigError(f"The device must be {DEVICES}, got {name!r:.40}.")
    return device


def _check_cuda(device: torch.device) -> None:
    """Raise ConfigError if this torch or this machine lacks a CUDA device."""
    if not torch.backends.cuda.is_built():
        raise ConfigError(
            f"This torch ({torch.__version__}) is built without CUDA.",
            hint="Install its CUDA build (docs/install.md), or use --device cpu.",
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "This machine has no CUDA device.", hint="Check nvidia-smi, or use --device cpu."
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ConfigError(
            f"The device must be one of {', '.join(f'cuda:{index}' for index in range(count))}, "
            f"got {device}."
        )


def choose_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """Return the named dtype, or bf16 if the device multiplies it natively, else fp32.

    A GPU without bf16 gets fp32 and a warning in the log. Raises ConfigError for another dtype:
    fp16 overflows in these models.
    """
    if name is not None:
        if name not in _DTYPES:
            raise ConfigError(f"The dtype must be one of {', '.join(_DTYPES)}, got {name!r:.40}.")
        return _DTYPES[name]
    if multiplies_bf16(device):
        return torch.bfloat16
    if device.type == "cuda":
        log.warning("%s has no native bf16: float32 is used, with twice the memory.", device)
    return torch.float32


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bf16 natively; unknown, and so False, for mps."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    native = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
    return device.type == "cpu" and native


def free_device_memory(device: torch.device) -> int:
    """Return the free bytes of a CUDA device; what torch holds without using it is free."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def peak_memory_bytes() -> int:
    """Return the peak resident set size of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
