#!/usr/bin/env python3
"""Checks that no script does anything when it is imported: python3 scripts/check_imports.py

At the top level of a file under scripts/ only these may stand: a docstring, imports, functions,
classes, constants, and `if __name__ == "__main__":` as the last statement. A constant's value calls
nothing but Path, methods of paths and strings, and re.compile. Files are parsed, not imported, so
that none of their packages is needed.
"""

import ast
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
CALLS_IN_CONSTANTS = {"Path", "resolve", "split", "compile"}
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def is_constant(statement):
    """Whether a statement assigns a value made without running code of others."""
    if not isinstance(statement, ast.Assign):
        return False
    if not all(isinstance(target, ast.Name | ast.Tuple) for target in statement.targets):
        return False
    calls = [node.func for node in ast.walk(statement.value) if isinstance(node, ast.Call)]
    return all(
        getattr(call, "attr", getattr(call, "id", "")) in CALLS_IN_CONSTANTS for call in calls
    )


def is_docstring(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def is_main_guard(statement):
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def problems(path):
    """Yields a message for each statement that runs on import."""
    body = ast.parse(path.read_text()).body
    for index, statement in enumerate(body):
        if isinstance(statement, DEFINITIONS) or is_constant(statement):
            continue
        if is_docstring(statement) and index == 0:
            continue
        if is_main_guard(statement) and index == len(body) - 1:
            continue
        first_line = ast.unparse(statement).splitlines()[0]
        yield f"{path}:{statement.lineno}: runs on import: {first_line}"


def main():
    paths = sorted(FOLDER.rglob("*.py"))
    found = [problem for path in paths for problem in problems(path)]
    for problem in found:
        print(problem, file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
