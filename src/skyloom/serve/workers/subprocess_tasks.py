"""Tasks that need models or decoders, each in a child process for one request.

The server itself loads no network and opens no media. The child is started as
`python -m skyloom.serve.workers.subprocess_tasks NAME`, reads JSON from standard input and writes
one line of JSON; its heavy imports happen inside the task functions.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from skyloom.core.errors import (
    CapacityError,
    MediaError,
    RequestError,
    SkyloomError,
    UncheckedError,
)
from skyloom.core.log import redact_traceback
from skyloom.generate.request import Request
from skyloom.safety.moderation import ModerationResult
from skyloom.serve.queue.library import CharacterLikeness
from skyloom.serve.storage import Asset, AssetStorage

if TYPE_CHECKING:
    from skyloom.safety.verify import Findings

TIMEOUT_SECONDS = 60
_MODULE = "skyloom.serve.workers.subprocess_tasks"
_VALIDATION_STATES = {"trusted": "trusted", "untrusted": "valid", "invalid": "invalid"}
_OUTCOMES = {True: "detected", False: "not_detected"}
_ONE_AT_A_TIME = threading.Lock()

log = logging.getLogger(__name__)


def plan_in_subprocess(request: Request) -> dict[str, Any]:
    """Plan and estimate of a request. Raises RequestError; CapacityError after a timeout."""
    return _run_task("plan", request.to_dict())


def verify_in_subprocess(storage: AssetStorage, asset: Asset, data: Path) -> list[dict[str, Any]]:
    """Verification results of a stored file; keys and registry are read from the folder `data`."""
    with TemporaryDirectory(prefix="skyloom-verify-") as folder:
        path = storage.fetch(asset, Path(folder) / f"file.{asset.suffix}")
        environment = {"SKYLOOM_DATA": str(data.absolute())}
        return _run_task("verify", {"path": str(path)}, environment=environment)["results"]


def inspect_in_subprocess(
    storage: AssetStorage, asset: Asset, *, recognise: bool
) -> tuple[ModerationResult, CharacterLikeness]:
    """Moderate a stored picture or video; with `recognise`, identify the subject of an allowed one.

    Raises MediaError (unreadable file), UncheckedError (a classifier failed) and CapacityError
    (timeout).
    """
    with TemporaryDirectory(prefix="skyloom-inspect-") as folder:
        path = storage.fetch(asset, Path(folder) / f"file.{asset.suffix}")
        request = {"path": str(path), "recognise": recognise}
        response = _run_task("inspect", request, hidden_path=str(path))
    return ModerationResult(**response["verdict"]), CharacterLikeness(**response["likeness"] or {})


def _run_task(
    name: str,
    request: Mapping[str, Any],
    *,
    hidden_path: str = "",
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a task in a child process and return its response; one at a time, since each is large.

    Error messages say "The file" in place of `hidden_path`.
    """
    if not _ONE_AT_A_TIME.acquire(timeout=TIMEOUT_SECONDS):
        raise CapacityError("The server is busy.", hint="Try again.", retry_after=10)
    try:
        done = subprocess.run(
            [sys.executable, "-m", _MODULE, name],
            input=json.dumps(request),
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        response = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        message = f"The {name} task took longer than {TIMEOUT_SECONDS} s."
        raise CapacityError(message, hint="Try again.", retry_after=10) from error
    except (IndexError, ValueError) as error:
        log.error(
            "task %s exited with %s: %s", name, done.returncode, redact_traceback(done.stderr)
        )
        raise SkyloomError(f"The {name} task failed.") from error
    finally:
        _ONE_AT_A_TIME.release()
    if "error" in response:
        raise _error_from(response["error"], hidden_path)
    return response


def _error_from(error: Mapping[str, Any], hidden_path: str) -> SkyloomError:
    """Rebuild the exception that the child reported."""
    message = error["message"]
    if hidden_path:
        message = message.replace(hidden_path, "The file")
    if error["code"] == UncheckedError.code:
        return UncheckedError(message, rule=error["rule"], target="input")
    return MediaError(message) if error["code"] == MediaError.code else RequestError(message)


def _plan(request: Mapping[str, Any]) -> dict[str, Any]:
    from skyloom.generate.plan_summary import plan_and_estimate, plan_to_dict

    return plan_to_dict(*plan_and_estimate(Request.from_dict(request)))


def _inspect(request: Mapping[str, Any]) -> dict[str, Any]:
    from skyloom.evaluate.subject_recognition import recognize_subject
    from skyloom.safety.frame_moderation import load_frame_moderator, moderate_file

    path = Path(request["path"])
    judge = load_frame_moderator()
    verdict = ModerationResult(True) if judge is None else moderate_file(judge, path)
    subject = recognize_subject(path) if verdict.allowed and request["recognise"] else None
    return {"verdict": asdict(verdict), "likeness": None if subject is None else asdict(subject)}


def _verify(request: Mapping[str, Any]) -> dict[str, Any]:
    from skyloom.safety.verify import check

    return {"results": verification_results(check(Path(request["path"])))}


def verification_results(findings: "Findings") -> list[dict[str, Any]]:
    """Findings as API results: `c2pa` as OpenAI's clients parse it, then watermark and registry."""
    credentials = findings.credentials
    generation = (credentials and credentials.generation) or {}
    watermark_ids = [mark.identity for mark in findings.marks]
    matches = [{"by": match.by, "made_at": match.record.made_at} for match in findings.matches]
    return [
        {
            "type": "c2pa",
            "outcome": _OUTCOMES[bool(credentials)],
            "validation_state": (
                _VALIDATION_STATES[credentials.state] if credentials else "not_present"
            ),
            "issuer": credentials.issuer if credentials else None,
            "model": generation.get("model"),
            "generated_at": None,
        },
        {
            "type": "skyloom_watermark",
            "outcome": _OUTCOMES[bool(watermark_ids)],
            "ids": watermark_ids,
        },
        {"type": "skyloom_registry", "outcome": _OUTCOMES[bool(matches)], "matches": matches},
    ]


_TASKS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "plan": _plan,
    "inspect": _inspect,
    "verify": _verify,
}


def main() -> None:
    """Run the task named by the first argument; write its response or its error."""
    try:
        response = _TASKS[sys.argv[1]](json.loads(sys.stdin.read()))
    except (RequestError, MediaError, CapacityError, UncheckedError) as error:
        rule = getattr(error, "rule", None)
        response = {"error": {"code": error.code, "message": str(error), "rule": rule}}
    sys.stdout.write(json.dumps(response) + "\n")


if __name__ == "__main__":
    main()
