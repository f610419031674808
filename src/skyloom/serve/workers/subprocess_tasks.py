"""Work that needs what the server does not load: planner, verifier and viewer, each a process for one question.

The server knows no networks and opens no media, so it stays small and cannot be brought down by either.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
from skyloom.serve.queue.library import Likeness
from skyloom.serve.storage.folder import Asset, Storage

SECONDS = 60
log = logging.getLogger(__name__)
_ONE_AT_A_TIME = threading.Lock()


def plan_in_child(request: Request) -> dict[str, Any]:
    """What a request would take. Raises RequestError for what cannot be made, CapacityError when it takes too long."""
    return _ask("skyloom.serve.workers.plan_task", request.to_json())


def verify_in_child(storage: Storage, asset: Asset, data: Path) -> dict[str, Any]:
    """The marks that a stored file carries, as safety/verify.py finds them."""
    with TemporaryDirectory(prefix="skyloom-verify-") as folder:
        path = storage.fetch(asset, Path(folder) / f"file.{asset.suffix}")
        return _ask(
            "skyloom.serve.workers.verify_task",
            json.dumps({"path": str(path)}),
            SKYLOOM_DATA=str(data.absolute()),
        )


def view_in_child(
    storage: Storage, asset: Asset, *, recognise: bool
) -> tuple[ModerationResult, Likeness]:
    """What the policy says of a stored picture or video and, if asked and allowed, who it shows. Raises MediaError for
    what cannot be read, UncheckedError where a classifier fails, CapacityError when it takes too long."""
    with TemporaryDirectory(prefix="skyloom-view-") as folder:
        path = storage.fetch(asset, Path(folder) / f"file.{asset.suffix}")
        told = _ask(
            "skyloom.serve.workers.inspect_task",
            json.dumps({"path": str(path), "recognise": recognise}),
            hide=str(path),
        )
    return ModerationResult(**told["verdict"]), Likeness(**told["likeness"] or {})


def _ask(module: str, question: str, *, hide: str = "", **environment: str) -> dict[str, Any]:
    """Run a module with a question at its standard input; one process at a time, since each is large. A path to `hide`
    is no more than "The file" to clients."""
    if not _ONE_AT_A_TIME.acquire(timeout=SECONDS):
        raise CapacityError("Too many ask for that at once.", hint="Try again.", retry_after=10)
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=question,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        answer = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise CapacityError("That took too long.", hint="Try again.", retry_after=10) from error
    except (IndexError, ValueError) as error:
        log.error(
            "%s failed with code %s: %s", module, done.returncode, redact_traceback(done.stderr)
        )
        raise SkyloomError(f"{module} failed.") from error
    finally:
        _ONE_AT_A_TIME.release()
    if "error" in answer:
        code, message = answer["error"]["code"], answer["error"]["message"]
        message = message.replace(hide, "The file") if hide else message
        if code == UncheckedError.code:
            raise UncheckedError(message, rule=answer["error"]["rule"], target="input")
        raise (MediaError if code == MediaError.code else RequestError)(message)
    return answer


def answer(work: Any) -> None:
    """The child's side: read the question, do the work, and write one line, whatever comes of it."""
    try:
        told = work(json.loads(sys.stdin.read()))
    except (RequestError, MediaError, CapacityError, UncheckedError) as error:
        told = {
            "error": {
                "code": error.code,
                "message": str(error),
                "rule": getattr(error, "rule", None),
            }
        }
    sys.stdout.write(json.dumps(told) + "\n")
