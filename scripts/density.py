#!/usr/bin/env python3
"""Measures how dense the Rust code is, by its grammar: tokens of functions, closures, comments.

    python3 -m venv .venv-density
    .venv-density/bin/pip install -r scripts/requirements-density.txt
    .venv-density/bin/python scripts/density.py                    # all crates, the working tree
    .venv-density/bin/python scripts/density.py data train --worst 30
    .venv-density/bin/python scripts/density.py --git HEAD~3 --by-file

How it counts. Everything is outside tests: without items under `#[test]` and `#[cfg(test)]` and
without files named after tests; of a crate only `src` counts. A line of code is one that is not
blank and does not begin with `//`. A token is a leaf of the syntax tree that is no comment; a
string is three (quote, text, quote). A function has the tokens from its `pub` to its closing
brace, those of functions inside it included. Percentiles are elements of the sorted list, at
floor(p (n - 1)). Inside a macro's brackets there is no syntax: tokens count, closures do not.

Two counts of closures: "closures" are those of the grammar; "pairs of bars" are the texts `|..|`
in lines of code, which also finds the operator `||`. The second is how the first review of the
density counted (7.4 a hundred lines at 9f43b66).
"""

import argparse
import dataclasses
import io
import pathlib
import re
import statistics
import subprocess
import sys
import tarfile

ADAPTORS = {"map", "filter", "filter_map", "flat_map", "fold", "zip"}
COMMENTS = {"line_comment", "block_comment"}
WIDEST_COMMENT = 100
BARS = re.compile(r"[(,=\s]\|[^|]*\|")
TEST_ATTRIBUTE = re.compile(rb"#\[\s*(test\b|cfg\(\s*(all\(\s*)?test\b)")
WORDS = {
    "so many, so much": r"so (?:many|much)",
    "whoever, nobody, somebody": r"whoever|nobody|somebody",
    "gives": r"gives",
    "anew": r"anew",
    "again": r"again",
    "goes on": r"goes on",
    "is there": r"is there",
    "returns": r"returns",
}


@dataclasses.dataclass
class Function:
    """One function outside tests."""

    place: str
    name: str
    tokens: int
    lines: int


@dataclasses.dataclass
class Counts:
    """What was counted in some files; counts of several files add up."""

    functions: list = dataclasses.field(default_factory=list)
    files: int = 0
    lines: int = 0
    code: int = 0
    characters: int = 0
    closures: int = 0
    bars: int = 0
    adaptors: int = 0
    lets: int = 0
    tuple_lets: int = 0
    doc_lines: int = 0
    comment_lines: int = 0
    wide_comments: int = 0
    comment_text: str = ""

    def __add__(self, other):
        return Counts(**{name: own + getattr(other, name) for name, own in vars(self).items()})


def main():
    arguments = parse_arguments()
    parser = rust_parser()
    texts = read_git(arguments.git) if arguments.git else read_folder(pathlib.Path("."))
    by_file = {
        path: count_file(parser, path, text)
        for path, text in texts.items()
        if is_counted(path, arguments.crates)
    }
    if not by_file:
        sys.exit("no Rust file of these crates; start this script in the root of the repository")
    print_table(by_crate(by_file))
    if arguments.by_file:
        print_files(by_file)
    if arguments.worst:
        print_worst(sum(by_file.values(), Counts()).functions, arguments.worst)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    crates = "data, annotate, sdxl, train, cli (all five), checks"
    parser.add_argument("crates", nargs="*", help=crates)
    parser.add_argument("--git", metavar="REV", help="measure this revision, not the working tree")
    parser.add_argument("--worst", metavar="N", type=int, default=0, help="the N densest functions")
    parser.add_argument("--by-file", action="store_true", help="print a line for each file too")
    return parser.parse_args()


def rust_parser():
    try:
        import tree_sitter
        import tree_sitter_rust
    except ImportError:
        sys.exit("tree-sitter is not installed; the head of this script says how to install it")
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_rust.language()))


def read_folder(root):
    paths = [*root.glob("crates/*/src/**/*.rs"), *root.glob("checks/src/**/*.rs")]
    return {str(path): path.read_bytes() for path in sorted(paths)}


def read_git(revision):
    archive = subprocess.run(["git", "archive", revision], check=True, stdout=subprocess.PIPE)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        names = [name for name in files.getnames() if re.search(r"/src/.*\.rs$", name)]
        return {name: files.extractfile(name).read() for name in sorted(names)}


def crate_of(path):
    return path[: path.index("/src/")].removeprefix("crates/").removeprefix("rectiflow-")


def is_counted(path, crates):
    is_for_tests = re.search(r"(^|/)(tests/|tests\.rs$)|_tests?\.rs$", path)
    is_asked = crate_of(path) in crates if crates else path.startswith("crates/")
    return is_asked and not is_for_tests


def by_crate(by_file):
    crates = {}
    for path, counts in by_file.items():
        crates[crate_of(path)] = crates.get(crate_of(path), Counts()) + counts
    if len(crates) > 1:
        crates["all"] = sum(crates.values(), Counts())
    return crates


def count_file(parser, path, text):
    root = parser.parse(text).root_node
    if root.has_error:
        print(f"{path}: parsed in part; what the grammar does not know are tokens", file=sys.stderr)
    tests = set()
    find_tests(root, tests)
    counts = Counts(files=1)
    count_nodes(root, path, tests, counts)
    count_lines(text.decode(), tests, counts)
    return counts


def find_tests(node, tests):
    """Adds the rows of every item under an attribute for tests, its attributes included."""
    start, is_test = None, False
    for child in node.children:
        if child.type == "attribute_item":
            start = child.start_point.row if start is None else start
            is_test = is_test or bool(TEST_ATTRIBUTE.match(child.text))
        elif child.type not in COMMENTS:
            if is_test:
                tests.update(range(start, child.end_point.row + 1))
            else:
                find_tests(child, tests)
            start, is_test = None, False


def count_nodes(node, path, tests, counts):
    if node.start_point.row in tests and node.parent is not None:
        return
    if node.type == "function_item":
        name = node.child_by_field_name("name").text.decode()
        lines = node.end_point.row - node.start_point.row + 1
        place = f"{path}:{node.start_point.row + 1}"
        counts.functions.append(Function(place, name, tokens_of(node), lines))
    elif node.type == "closure_expression":
        counts.closures += 1
    elif node.type == "let_declaration":
        counts.lets += 1
        counts.tuple_lets += node.child_by_field_name("pattern").type == "tuple_pattern"
    elif node.type == "call_expression":
        counts.adaptors += method_of(node) in ADAPTORS
    for child in node.children:
        count_nodes(child, path, tests, counts)


def tokens_of(node):
    if node.type in COMMENTS:
        return 0
    return sum(map(tokens_of, node.children)) if node.children else 1


def method_of(call):
    """The method that is called, or None where it is a function."""
    called = call.child_by_field_name("function")
    if called.type == "generic_function":
        called = called.child_by_field_name("function")
    if called.type != "field_expression":
        return None
    return called.child_by_field_name("field").text.decode()


def count_lines(text, tests, counts):
    for row, line in enumerate(text.splitlines()):
        if row in tests:
            continue
        counts.lines += 1
        stripped = line.strip()
        if stripped.startswith("//"):
            count_comment(line, stripped, counts)
        elif stripped:
            counts.code += 1
            counts.characters += len(stripped)
            counts.bars += len(BARS.findall(line))


def count_comment(line, stripped, counts):
    is_doc = stripped.startswith(("///", "//!"))
    counts.doc_lines += is_doc
    counts.comment_lines += not is_doc
    counts.wide_comments += len(line) > WIDEST_COMMENT
    # One text, so that a phrase is found that two lines share.
    counts.comment_text += stripped.lstrip("/!") + " "


def percentile(values, fraction):
    return sorted(values)[int(fraction * (len(values) - 1))]


def spread(values):
    highest = [percentile(values, 0.9), percentile(values, 0.99), max(values)]
    return " / ".join(f"{value:.0f}" for value in [statistics.median(values), *highest])


def rows_of(counts):
    """The lines of the table: what, and its text."""
    hundreds = counts.code / 100
    comments = counts.doc_lines + counts.comment_lines
    text = re.sub(r"\s+", " ", counts.comment_text)
    yield "files", f"{counts.files}"
    yield "lines / lines of code", f"{counts.lines} / {counts.code}"
    yield "functions", f"{len(counts.functions)}"
    tokens = [function.tokens for function in counts.functions]
    lines = [function.lines for function in counts.functions]
    yield "tokens a function: median / p90 / p99 / max", spread(tokens)
    yield "lines a function: median / p90 / p99 / max", spread(lines)
    yield "closures a hundred lines of code", f"{counts.closures / hundreds:.2f}"
    yield "pairs of bars a hundred lines of code", f"{counts.bars / hundreds:.2f}"
    yield "adaptors a hundred lines of code", f"{counts.adaptors / hundreds:.2f}"
    yield "let (a, b) among all let, %", f"{100 * counts.tuple_lets / max(counts.lets, 1):.1f}"
    yield "characters a line of code", f"{counts.characters / counts.code:.1f}"
    yield (
        "doc / other comment lines, % of lines",
        " / ".join(
            f"{100 * part / counts.lines:.1f}" for part in (counts.doc_lines, counts.comment_lines)
        ),
    )
    yield f"comment lines wider than {WIDEST_COMMENT} columns", f"{counts.wide_comments}"
    for words, pattern in WORDS.items():
        found = len(re.findall(rf"\b(?:{pattern})\b", text, re.IGNORECASE))
        yield f'"{words}" a thousand comment lines', f"{1000 * found / max(comments, 1):.1f}"


def print_table(crates):
    columns = {name: dict(rows_of(counts)) for name, counts in crates.items()}
    widths = {name: max(map(len, [name, *rows.values()])) for name, rows in columns.items()}
    names = list(next(iter(columns.values())))
    left = max(map(len, names))
    print(" " * left, *(name.rjust(widths[name]) for name in columns), sep="  ")
    for row in names:
        cells = [texts[row].rjust(widths[name]) for name, texts in columns.items()]
        print(row.ljust(left), *cells, sep="  ")


def print_files(by_file):
    print("\nlines of code, functions, tokens a function (median, max), closures a hundred lines")
    for path, counts in by_file.items():
        tokens = [function.tokens for function in counts.functions] or [0]
        closures = 100 * counts.closures / max(counts.code, 1)
        functions = f"{len(tokens):4} {statistics.median(tokens):5.0f} {max(tokens):5}"
        print(f"{counts.code:5} {functions} {closures:5.1f}  {path}")


def print_worst(functions, number):
    print("\ntokens, lines")
    for function in sorted(functions, key=lambda function: -function.tokens)[:number]:
        print(f"{function.tokens:5} {function.lines:4}  {function.place} {function.name}")


if __name__ == "__main__":
    main()
