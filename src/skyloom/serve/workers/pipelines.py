"""Models of a worker: what it announces, and the pipelines that stay loaded between jobs.

What a model needs at least is planned or, for small models, estimated from its files. When the next
model does not fit whole beside the loaded ones, the least recently used are freed first.
"""

import gc
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from skyloom.core.device import choose_dtype
from skyloom.core.errors import CheckpointError
from skyloom.generate.estimate import free_memory
from skyloom.generate.memory import make_planner
from skyloom.generate.pipeline import Pipeline, load
from skyloom.generate.plan import make_plan
from skyloom.generate.request import Request
from skyloom.models.base import find_loader
from skyloom.models.memory import FreeMemory
from skyloom.models.registry import ModelInfo, estimate_memory, find_model, find_models
from skyloom.serve.queue.capabilities import Capabilities
from skyloom.serve.settings import Settings

log = logging.getLogger(__name__)


def worker_models(settings: Settings) -> dict[str, ModelInfo]:
    """Find the models of this host by name: the installed ones and those of the settings."""
    return find_models(settings.models.values())


def find_capabilities(settings: Settings, device: str) -> Capabilities:
    """Find the models and LoRAs whose files are on this host, and the memory for them."""
    models: dict[str, int] = {}
    for name, info in worker_models(settings).items():
        try:
            models[name] = needed_memory(info, torch.device(device))
        except CheckpointError as error:
            log.warning("model left out", extra={"model": name, "cause": error.message})
    loras = tuple(sorted(name for name, file in settings.loras.items() if Path(file).is_file()))
    memory = settings.worker_memory_bytes or free_device_memory(device)
    capabilities = Capabilities(models, loras, memory)
    usable = capabilities.usable_models
    for name in models.keys() - set(usable):
        values = {"model": name, "bytes": models[name], "worker_memory_bytes": memory}
        log.warning("model does not fit into the memory", extra=values)
    values = {"device": device, "models": usable, "loras": list(loras), "memory_bytes": memory}
    log.info("worker started", extra=values)
    return capabilities


def free_device_memory(device: str) -> int:
    """Return the free bytes of memory of a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return free_memory()


def needed_memory(info: ModelInfo, device: torch.device) -> int:
    """Return the bytes of a device that a model needs at least. Raises CheckpointError.

    For a large model on a GPU, those of the plan that takes least at the model's own size; parts
    that do not fit stay in host memory. For others, the estimate from the files.
    """
    size = estimate_memory(info)
    cost = find_loader(info).read_network_cost(info) if device.type != "cpu" else None
    if cost is None or cost.memory is None:
        return size
    plan = make_plan(Request("a video"), info, cost.scale)
    free = FreeMemory(free_memory(), 0)
    dtype = choose_dtype(device)
    planner = make_planner(plan, info, cost, device=device, dtype=dtype, free=free)
    return size if planner is None else planner.choose().device_peak


class PipelineCache:
    """Pipelines that are loaded on one device, at most `memory_bytes` by their estimates.

    `models` are those found by other means than their installed name or folder. `loras`: paths of
    the LoRAs that jobs may use, by name.
    """

    def __init__(
        self,
        device: str | None,
        models: Mapping[str, ModelInfo],
        memory_bytes: int | None = None,
        *,
        loras: Mapping[str, str] | None = None,
        load: Callable[..., Pipeline] = load,
    ) -> None:
        self._device = device
        self._models = models
        self._memory_bytes = memory_bytes
        self._loras = dict(loras or {})
        self._load = load
        self._loaded: dict[str, tuple[Pipeline, int]] = {}  # the least recently used first

    @property
    def names(self) -> list[str]:
        """Names of the loaded models, the least recently used first."""
        return list(self._loaded)

    def get(self, name: str, *, alone: bool = False) -> Pipeline:
        """Return the pipeline of a model, which is loaded if necessary.

        `alone` frees all other models first. Raises RequestError for an unknown model,
        CheckpointError for a damaged one.
        """
        held = self._loaded.pop(name, None)
        if held is None:
            info = self._models.get(name) or find_model(name)
            size = estimate_memory(info)
            self._evict(None if alone else size)
            held = (self._load(str(info.folder), device=self._device, loras=self._loras), size)
        elif alone:
            self._evict(None)
        self._loaded[name] = held
        return held[0]

    def _evict(self, size: int | None) -> None:
        """Free the least recently used models until `size` bytes fit; None frees all."""
        evicted = False
        while self._loaded and not self._fits(size):
            name = next(iter(self._loaded))
            del self._loaded[name]
            evicted = True
            log.info("model evicted", extra={"model": name})
        if evicted:
            gc.collect()  # a pipeline may be part of a reference cycle
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _fits(self, size: int | None) -> bool:
        if size is None:
            return False
        if self._memory_bytes is None:
            return True
        return sum(used for _, used in self._loaded.values()) + size <= self._memory_bytes
