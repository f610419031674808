"""The viewer's process: a stored picture or video in; what the policy says of it, and who it shows, out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from skyloom.evaluate.subject_recognition import recognize_subject
from skyloom.safety.frame_moderation import find_judge, judge_file
from skyloom.safety.moderation import Verdict
from skyloom.serve.workers.subprocess_tasks import answer


def view(question: dict[str, Any]) -> dict[str, Any]:
    """Look at a file; who it shows only where that is asked and allowed."""
    path, judge = Path(question["path"]), find_judge()
    verdict = Verdict(True) if judge is None else judge_file(judge, path)
    recognised = (
        asdict(recognize_subject(path)) if verdict.allowed and question["recognise"] else None
    )
    return {"verdict": asdict(verdict), "likeness": recognised}


if __name__ == "__main__":
    answer(view)
