"""Revision 0001: tables of the first release."""

from alembic import op

from skyloom.serve.queue.migrations.version_4 import create_tables

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    create_tables(op.get_bind())
