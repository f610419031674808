"""Tables and indexes of version 4 of the database. Frozen: later versions leave them unchanged.

Versions 1 to 4 created missing tables whenever a database was opened, without a new version number.
So an older database may lack any of these tables, and both functions create only what is missing.
"""

from importlib.resources import files
from string import Template

from sqlalchemy import Connection

_TYPES = {
    "sqlite": {
        "serial": "INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT",
        "key": "INTEGER",
        "double": "DOUBLE",
        "version": "INTEGER",
    },
    "postgresql": {
        "serial": "BIGSERIAL NOT NULL PRIMARY KEY",
        "key": "BIGINT",
        "double": "DOUBLE PRECISION",
        "version": "SERIAL",
    },
}


def create_tables(connection: Connection) -> None:
    """Create the tables of version 4 that are missing, without indexes."""
    _execute(connection, "tables_v4.sql")


def create_indexes(connection: Connection) -> None:
    """Create the indexes of version 4 that are missing."""
    _execute(connection, "indexes_v4.sql")


def _execute(connection: Connection, name: str) -> None:
    script = Template((files("skyloom.serve.queue.migrations") / name).read_text(encoding="utf-8"))
    for statement in script.substitute(_TYPES[connection.dialect.name]).split(";\n"):
        if statement.strip():
            connection.exec_driver_sql(statement)
