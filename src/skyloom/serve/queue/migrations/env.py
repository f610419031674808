"""Alembic environment: run revisions on the connection, and in the transaction, of upgrade.py."""

from collections.abc import Collection, Mapping
from typing import Any

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo
from sqlalchemy import text

_attributes: dict[Any, Any] = context.config.attributes


def _add_version(
    ctx: MigrationContext, step: MigrationInfo, heads: Collection[Any], run_args: Mapping[str, Any]
) -> None:
    """Add the revision to `schema_version`, from which skyloom before 0005 reads its version."""
    assert ctx.connection is not None
    ctx.connection.execute(
        text("INSERT INTO schema_version (version, at) VALUES (:v, :at) ON CONFLICT DO NOTHING"),
        {"v": int(step.up_revision_ids[0]), "at": _attributes["now"]},
    )


context.configure(
    connection=_attributes["connection"],
    target_metadata=_attributes["metadata"],
    render_as_batch=True,
    transactional_ddl=True,
    on_version_apply=_add_version,
)
with context.begin_transaction():
    context.run_migrations()
