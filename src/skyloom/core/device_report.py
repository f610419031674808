# pyright: basic
"""Describe the devices of this machine: name, memory, bf16, and the attention kernels that run."""

import shutil
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from skyloom.core.device import multiplies_bf16

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_ATTENTION_SHAPE = (1, 2, 64, 64)  # batch, heads, tokens, channels
_OPERATOR = "_scaled_dot_product_"
_GIB = 2**30
_DRIVER_SECONDS = 10


def device_rows(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """Yield names and values about the device that is used, and every GPU of the machine."""
    if torch.cuda.is_available():
        yield "cuda", f"{torch.version.cuda}, driver {find_driver()}"
        for index in range(torch.cuda.device_count()):
            yield "gpu", describe_gpu(index)
    elif torch.backends.mps.is_available():
        yield "gpu", "mps (Apple), used only by --device mps; not tested"
    else:
        built = torch.backends.cuda.is_built()
        yield "gpu", "none found" if built else "none: this torch is built without CUDA"
    if device.type == "cpu":
        yield "cpu", describe_cpu()
    yield "attention", describe_attention(device, dtype)


def describe_gpu(index: int) -> str:
    """Describe a CUDA device in one line."""
    properties = cast("Any", torch.cuda).get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    bf16 = "bf16" if multiplies_bf16(torch.device("cuda", index)) else "no bf16: float32 is used"
    return (
        f"cuda:{index} {properties.name}, compute capability {properties.major}."
        f"{properties.minor}, {total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free, {bf16}"
    )


def describe_cpu() -> str:
    """Return the instruction sets that torch uses, and those for bf16."""
    cpu = torch.cpu
    bf16 = {
        "AVX512-BF16": cpu._is_avx512_bf16_supported(),  # pyright: ignore[reportPrivateUsage]
        "AMX": cpu._is_amx_tile_supported(),  # pyright: ignore[reportPrivateUsage]
    }
    found = ", ".join(name for name, has in bf16.items() if has) or "none, so float32 is used"
    return f"kernels for {torch.backends.cpu.get_cpu_capability()}; bf16 by {found}"


def describe_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Run a small attention by default and by each kernel alone; say which ones run."""
    query = torch.randn(_ATTENTION_SHAPE, dtype=dtype, device=device)
    with _OperatorNames() as default:
        F.scaled_dot_product_attention(query, query, query)
    names = [name for name in default.names if name.startswith(_OPERATOR)]
    chosen = names[0].removeprefix(_OPERATOR).split(".")[0] if names else "math"
    running = [name for name, backend in _BACKENDS.items() if _runs(query, backend)]
    return f"{chosen}; kernels that run: {', '.join(running) or 'none'}"


def find_driver() -> str:
    """Return the version of the NVIDIA driver, or "unknown"."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(
            query, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (ran.stdout.split() or ["unknown"])[0]


def _runs(query: Tensor, backend: SDPBackend) -> bool:
    """Return whether a kernel gives a finite result on this device."""
    with warnings.catch_warnings():  # torch warns why a kernel cannot run
        warnings.simplefilter("ignore")
        try:
            with sdpa_kernel([backend]):
                return bool(F.scaled_dot_product_attention(query, query, query).isfinite().all())
        except RuntimeError:
            return False


class _OperatorNames(TorchDispatchMode):
    """Collects the names of the operators that run inside the context."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))
