"""Takes single functions out of a ComfyUI checkout, for samplers.py and schedules.py.

Functions are found by name in the syntax tree, so that none of ComfyUI's many dependencies is
needed. None of its code reaches the output.
"""

import argparse
import ast
import pathlib
import subprocess
import sys
import types


def take(path, wanted, names):
    """Defines a file's functions and classes called `wanted` in `names`; returns the namespace."""
    tree = ast.parse(path.read_text())
    definitions = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    found = [definition for definition in definitions if definition.name in wanted]
    missing = set(wanted) - {definition.name for definition in found}
    if missing:
        sys.exit(f"{path} has no {sorted(missing)}")
    exec(compile(ast.Module(found, []), path, "exec"), names)
    return types.SimpleNamespace(**names)


def argument_parser(description, out):
    """A parser for CHECKOUT, --commit and --out, which defaults to `out`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("--commit", help="the checkout's commit, if it is not a git work tree")
    parser.add_argument("--out", type=pathlib.Path, default=out)
    return parser


def commit_of(args):
    """The commit given with --commit, or the one checked out."""
    if args.commit:
        return args.commit
    git = ["git", "-C", str(args.checkout), "rev-parse", "HEAD"]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
