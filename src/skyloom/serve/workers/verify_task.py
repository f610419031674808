"""The verifier's process: a stored file in, what its three layers of marks say out, in the API's own shape."""

from pathlib import Path
from typing import Any

from skyloom.safety.verify import Findings, check
from skyloom.serve.workers.subprocess_tasks import answer

_STATES = {"trusted": "trusted", "untrusted": "valid", "invalid": "invalid"}


def verify(question: dict[str, Any]) -> dict[str, Any]:
    """Look at a file. Keys and registry are the server's own, in the data folder that SKYLOOM_DATA names."""
    return {"results": results_of(check(Path(question["path"])))}


def results_of(findings: Findings) -> list[dict[str, Any]]:
    """C2PA as OpenAI's clients know it, then our watermark and our registry, which they pass through."""
    found = findings.credentials
    made = found.generation if found and found.generation else {}
    c2pa = {
        "type": "c2pa",
        "outcome": "detected" if found else "not_detected",
        "validation_state": _STATES[found.state] if found else "not_present",
        "issuer": found.issuer if found else None,
        "model": made.get("model"),
        "generated_at": None,
    }
    seen = {True: "detected", False: "not_detected"}
    marks = [mark.identity for mark in findings.marks]
    matches = [{"by": match.by, "made_at": match.record.made_at} for match in findings.matches]
    watermark = {"type": "skyloom_watermark", "outcome": seen[bool(marks)], "ids": marks}
    return [
        c2pa,
        watermark,
        {"type": "skyloom_registry", "outcome": seen[bool(matches)], "matches": matches},
    ]


if __name__ == "__main__":
    answer(verify)
