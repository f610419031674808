"""Every statement of a block, with how the database would run it and how much it read.

On SQLite work is counted in instructions of its virtual machine: they grow with the rows that are
looked at and do not depend on the machine. On Postgres it is counted in rows that the scans of a
SELECT looked at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, event

# What may grow with the history. An index that holds active jobs only is as bounded as the queue.
GROWING = (
    *("jobs", "results", "events", "webhook_deliveries", "idempotency_keys", "files", "characters"),
    *("batches", "batch_lines", "assets"),
)
BOUNDED_INDEX = "jobs_active"
_STEP = 10  # instructions
_PAGE = 101  # rows


@dataclass
class Seen:
    """What a block did: its statements, those that scanned a table that grows, and their work."""

    statements: list[str] = field(default_factory=list[str])
    scans: list[str] = field(default_factory=list[str])
    work: int = 0


@contextmanager
def watched() -> Iterator[Seen]:
    """Watch all statements of all databases that are done in the block, by whatever thread."""
    seen = Seen()

    def before(connection, _cursor, statement, parameters, _context, executemany) -> None:
        if executemany or not statement.lstrip().startswith(
            ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")
        ):
            return
        seen.statements.append(statement)
        raw = connection.connection.dbapi_connection
        if connection.dialect.name == "postgresql":
            _explain_postgres(raw, statement, parameters, seen)
        else:
            raw.set_progress_handler(None, 0)
            plan = [row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            seen.scans += [f"{line}: {statement}" for line in plan if _scans(line)]
            raw.set_progress_handler(count, _STEP)

    def count() -> int:
        seen.work += _STEP
        return 0

    def after(connection, *_: object) -> None:
        if connection.dialect.name == "sqlite":
            connection.connection.dbapi_connection.set_progress_handler(None, 0)

    event.listen(Engine, "before_cursor_execute", before)
    event.listen(Engine, "after_cursor_execute", after)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", before)
        event.remove(Engine, "after_cursor_execute", after)


def _scans(line: str) -> bool:
    """Whether a line of an SQLite plan reads a whole table that grows, or a whole index of one."""
    words = line.split()
    return words[0] == "SCAN" and words[1] in GROWING and words[-1] != BOUNDED_INDEX


def _explain_postgres(raw: Any, statement: str, parameters: Any, seen: Seen) -> None:
    """Explain the plan without sequential scans; run SELECTs to count their rows."""
    reads = statement.lstrip().startswith("SELECT") and "pg_" not in statement
    how = "ANALYZE, FORMAT JSON" if reads else "FORMAT JSON"
    with raw.cursor() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")
        cursor.execute(f"EXPLAIN ({how}) {statement}", parameters)
        plan = cursor.fetchone()[0][0]["Plan"]
        cursor.execute("SET LOCAL enable_seqscan = on")
    for node in _nodes(plan):
        if node.get("Relation Name") not in GROWING or not node["Node Type"].endswith("Scan"):
            continue
        found = node["Node Type"].startswith(("Index", "Bitmap Heap")) and (
            "Index Cond" in node
            or "Recheck Cond" in node
            or node.get("Index Name") == BOUNDED_INDEX
        )
        rows = int(
            (node.get("Actual Rows", 0) + node.get("Rows Removed by Filter", 0))
            * node.get("Actual Loops", 1)
        )
        seen.work += rows
        if not found and not (
            reads and rows <= _PAGE
        ):  # a walk in the order of an index that ends at its LIMIT
            seen.scans.append(f"{node['Node Type']} of {node['Relation Name']}: {statement}")


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for one in plan.get("Plans", []):
        yield from _nodes(one)
