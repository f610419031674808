"""Revision 0002: empty, since no release had version 2."""

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Change nothing."""
