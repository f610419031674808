"""Revision 0006: what workers announce, and what jobs need of a worker."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_MODEL = {
    "sqlite": "json_extract(request, '$.model')",
    "postgresql": "request ->> 'model'",
}
_LIST = {"sqlite": "json_array({})", "postgresql": "CAST(json_build_array({}) AS TEXT)"}


def upgrade() -> None:
    """Add the columns; the needs of a job are the model of its request."""
    op.add_column("workers", sa.Column("capabilities", sa.JSON))
    default = sa.text("""'["diorama"]'""")
    op.add_column("jobs", sa.Column("needs", sa.Text, nullable=False, server_default=default))
    dialect = op.get_bind().dialect.name
    model = _MODEL[dialect]
    needs = _LIST[dialect].format(model)
    op.execute(f"UPDATE jobs SET needs = {needs} WHERE {model} IS NOT NULL")
