"""Revision 0005: sessions of web pages and their one-use sign-in codes."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the tables sessions and sign_in_codes."""
    for name in ("sessions", "sign_in_codes"):
        op.create_table(
            name,
            sa.Column("digest", sa.String(64), primary_key=True),
            sa.Column("owner", sa.String(128), nullable=False),
            sa.Column("scopes", sa.JSON, nullable=False),
            sa.Column("key_id", sa.String(12)),
            sa.Column("token_digest", sa.String(64)),
            sa.Column("created_at", sa.Double, nullable=False),
            sa.Column("expires_at", sa.Double, nullable=False),
        )
        op.create_index(f"{name}_of_owner", name, ["owner", "created_at"])
