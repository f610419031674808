"""Memory of a video: plan where the parts lie before the first step, and step down if it runs out.

A call that ran out of memory is repeated with the parts placed differently (models/memory.py), so
sampling goes on from its last step and ends in the same result.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch

from skyloom.core.device import free_device_memory
from skyloom.core.errors import CapacityError
from skyloom.generate.estimate import free_memory, tokens_per_frame, workload_of
from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.plan import Plan
from skyloom.models.base import ModelBundle, NetworkCost
from skyloom.models.memory import (
    MEMORY_HINT,
    PHASE_NAMES,
    PHASE_PARTS,
    RUNGS,
    Demand,
    FreeMemory,
    MemoryPlan,
    MemoryPlanner,
    Phase,
)
from skyloom.models.registry import ModelInfo

T = TypeVar("T")


def make_planner(
    plan: Plan,
    model: ModelInfo,
    cost: NetworkCost,
    *,
    device: torch.device,
    dtype: torch.dtype,
    free: FreeMemory,
) -> MemoryPlanner | None:
    """Return the planner of a video; None if its model is too small to need one, or not used."""
    if cost.memory is None or not plan.runs:
        return None
    work = workload_of(plan, model, cost, device=device.type, dtype=str(dtype))
    rollout = model.rollout
    cached = 0 if rollout is None or len(plan.windows) == 1 else rollout.sink + rollout.recent
    branches = 1 if plan.guidance_scale == 1.0 else 2
    demand = Demand(
        pixels=work.height * work.width,
        frames=work.frames,
        tokens=work.tokens,
        cached_tokens=cached * tokens_per_frame(plan, cost),
        branches=branches,
        parallel=branches if device.type == "cpu" else 1,
        calls=work.calls,
        windows=work.windows,
        pictures=bool(plan.request.media),
        itemsize=dtype.itemsize,
    )
    return MemoryPlanner(cost.memory, demand, free)


def measure_free_memory(device: torch.device, bundle: ModelBundle | None = None) -> FreeMemory:
    """Return the free bytes of host and device; what a bundle's parts take counts as free."""
    host = free_memory() + (0 if bundle is None else bundle.bytes_on("cpu"))
    if device.type == "cpu":
        return FreeMemory(host)
    own = 0 if bundle is None else bundle.bytes_on(device.type)
    return FreeMemory(host, free_device_memory(device) + own)


class MemoryGuard:
    """Runs the calls of a video's phases with their parts in place, and steps down.

    planner, plan: None for models that need no plan; running out of memory is an error then.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        executor: DeterministicExecutor,
        planner: MemoryPlanner | None = None,
        plan: MemoryPlan | None = None,
    ) -> None:
        self.bundle = bundle
        self.executor = executor
        self._planner = planner
        self._plan = plan
        self._steps: list[str] = []
        self._notices: list[str] = []

    def phase(self, phase: Phase) -> "PhaseExecutor":
        """Return an executor for the calls of a phase."""
        return PhaseExecutor(self, phase)

    def run(self, phase: Phase, call: Callable[[], T]) -> T:
        """Run a call with the phase's part in place, again and again while memory runs out.

        Raises CapacityError if it runs out on the last rung.
        """
        while True:
            try:
                with self.bundle.use(PHASE_PARTS[phase]):
                    return call()
            except torch.OutOfMemoryError:
                pass  # the traceback holds tensors of the failed call until here
            self._step_down(phase)

    def take_notice(self) -> str | None:
        """Return what happened since the last call, for the user."""
        text = " ".join(self._notices) or None
        self._notices.clear()
        return text

    def notes(self) -> dict[str, Any]:
        """Return the notes of the receipt: the last plan, and the phases that ran out of memory."""
        if self._plan is None:
            return {}
        return {"memory": {**self._plan.to_dict(), "ran_out": list(self._steps)}}

    def _step_down(self, phase: Phase) -> None:
        before = self._plan
        after = None
        if self._planner is not None and before is not None:
            after = self._planner.step_down(before, phase)
        if before is None or after is None:
            raise CapacityError(f"Memory ran out during {PHASE_NAMES[phase]}.", hint=MEMORY_HINT)
        self.bundle.arrange(after.rungs)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._plan = after
        self._steps.append(phase)
        changed = [
            f"{part.replace('_', ' ')}: {RUNGS[part][rung]}"
            for part, rung in after.rungs.items()
            if rung != before.rungs[part]
        ]
        self._notices.append(
            f"Memory ran out during {PHASE_NAMES[phase]}; going on with {'; '.join(changed)}."
        )


class PhaseExecutor(DeterministicExecutor):
    """Runs calls of one phase under a `MemoryGuard`, on the threads of its executor."""

    def __init__(self, guard: MemoryGuard, phase: Phase) -> None:
        self._guard = guard
        self._phase: Phase = phase

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Run all calls and return their results in order; one by one if blocks are streamed."""
        return self._guard.run(self._phase, partial(self._run, calls))

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Start a call on the background thread; such calls run one at a time, in order."""
        return self._guard.executor.submit(partial(self._guard.run, self._phase, call))

    def _run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        executor = self._guard.executor
        if self._guard.bundle.rungs[PHASE_PARTS[self._phase]] == "streamed":
            return [executor.run_one(call) for call in calls]
        return executor.run(calls)
