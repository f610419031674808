'''Versions of the database: alembic revisions, run when a database is opened (upgrade.py).

Revision 0007 is version 7. To add a revision:

1. Change the tables (tables.py and the modules beside it): new databases are created from them. New columns come last.
2. Write `versions/0007_what_it_does.py` (the newest four digits are the version; nothing else lists it):

       """Add jobs.colour."""
       import sqlalchemy as sa
       from alembic import op

       revision, down_revision = "0007", "0006"

       def upgrade() -> None:
           op.add_column("jobs", sa.Column("colour", sa.String(8)))

3. Run tests/serve/queue/test_migrations.py: it compares a new database with one that ran every revision, on SQLite and
   Postgres, and kills the migration of older databases.

Rules. A released revision is frozen and imports nothing that may change. All revisions of an update run in one
transaction, so a revision never commits. SQLite changes or drops a column only by a copy of the table
(`with op.batch_alter_table(...)`), which drops its triggers: after a copy of `jobs` call `create_job_counters`. Foreign
keys are off during a migration and checked before its commit. There are no downgrades: the way back is the backup.
'''
