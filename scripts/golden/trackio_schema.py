#!/usr/bin/env python3
"""Writes the tables of trackio's database as the installed trackio makes them.

    python3 scripts/golden/trackio_schema.py

Needs trackio (scripts/peers/requirements-watch.txt). `make peers-watch` fails when another version
makes other tables.
"""

import os
import pathlib
import re
import sqlite3
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "crates/rectiflow-train/src/measure/trackers/trackio.sql"


def statements(database):
    """The statements that make a database's tables and indexes, each with single spaces."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
            " ORDER BY type DESC, name"
        )
        found = [re.sub(r"\s+", " ", sql).strip() for (sql,) in rows]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    return [*found, f"PRAGMA user_version = {version}"]


def made_by_trackio():
    """The statements of a database that trackio makes in a temporary folder, and its version."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRACKIO_DIR"] = folder
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        return statements(SQLiteStorage.init_db("schema")), trackio.__version__


def main():
    found, version = made_by_trackio()
    lines = [f"-- The tables of trackio {version}, by scripts/golden/trackio_schema.py."]
    for statement in found:
        careful = re.sub(r"^CREATE (TABLE|INDEX|UNIQUE INDEX) ", _if_not_there, statement)
        lines.append(re.sub(r", (?=[a-z_]+ [A-Z])|\( (?=[a-z_]+ [A-Z])", _line, careful) + ";")
    TARGET.write_text("\n".join(lines) + "\n")


def _if_not_there(match):
    return f"CREATE {match[1]} IF NOT EXISTS "


def _line(match):
    return match[0].strip() + "\n    "


if __name__ == "__main__":
    main()
