'''Versions of the database: alembic revisions, run when a database is opened (upgrade.py).

A revision's number is the version that it migrates to. To add one, here 0006:

1. Change the tables (tables.py and the modules beside it), from which new databases are created.
   Append new columns at the end.
2. Write `versions/0006_what_it_does.py`. Its first four digits are the version; no list names it.

       """Revision 0006: colour of a job."""
       import sqlalchemy as sa
       from alembic import op

       revision = "0006"
       down_revision = "0005"

       def upgrade() -> None:
           """Add jobs.colour."""
           op.add_column("jobs", sa.Column("colour", sa.String(8)))

3. Run tests/serve/queue/test_migrations.py. It compares a new database with one that ran every
   revision, on SQLite and Postgres, and kills the migration of older databases.

Rules for revisions:

- A released revision is frozen. It imports nothing that may change, tables.py among it.
- All revisions of an update share one transaction, so a revision never commits.
- SQLite changes or drops a column only by copying the table (`with op.batch_alter_table(...)`).
  The copy loses triggers: after a copy of `jobs` call `create_job_counters` on SQLite. It loses
  AUTOINCREMENT unless `table_kwargs={"sqlite_autoincrement": True}` is passed.
- Foreign keys are off during a migration of SQLite, and checked before its commit.
- There are no downgrades: the way back is the copy from before the migration.
'''
