"""The planner's process: a request in, its plan and estimate out."""

from typing import Any

from skyloom.generate.plan_summary import plan_and_estimate, plan_to_dict
from skyloom.generate.request import Request
from skyloom.serve.workers.subprocess_tasks import answer


def plan(question: dict[str, Any]) -> dict[str, Any]:
    """What a request would take on this machine."""
    return plan_to_dict(*plan_and_estimate(Request.from_dict(question)))


if __name__ == "__main__":
    answer(plan)
