"""Revision 0003: empty, since no release had version 3."""

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Change nothing."""
