"""Log of a training run: one JSON line per logged step."""

import json
import time
from pathlib import Path
from typing import Any


class RunLog:
    """Appends to `log.jsonl`; `seconds` counts from the creation of this object."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since this object was created."""
        return time.monotonic() - self._started

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line, e.g. `write("step", 20, loss=0.5)`; floats keep six significant digits."""
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        line = {"kind": kind, "step": step, "seconds": round(self.seconds, 1), **rounded}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Read all lines of one kind, including those of earlier processes."""
        path = self.folder / "log.jsonl"
        if not path.exists():
            return []
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]
