"""Completes crates/rectiflow-sdxl/tests/golden/infotext.json: what Forge and reForge read of the
settings in our pictures.

    RECTIFLOW_WRITE_INFOTEXTS=1 cargo test --release -p rectiflow-sdxl --lib infotext
    pip install lark packaging
    python scripts/golden/infotext.py FORGE_CHECKOUT REFORGE_CHECKOUT

The test writes the texts; this script adds what each program reads of them. It runs the programs'
own functions, taken out of the checkouts by their names, in the order in which they draw a
picture: the settings' parser, comments, extra networks, composition by AND, schedules, attention.
"prompt" and "negative" are the texts of the one part that remains, "model" and "settings" what the
settings' parser returns. A text that is read as several parts, with a weight, or with a schedule is
recorded as a list, which no test takes for a text.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import pathlib
import re
import sys
import types
import warnings

import lark
from comfyui_source import commit_of
from packaging import version

TARGET = pathlib.Path("crates/rectiflow-sdxl/tests/golden/infotext.json")
STEPS = 28


def take_all(path, wanted, names):
    """Defines a file's functions, classes and constants called `wanted` in `names`."""
    body = [node for node in ast.parse(path.read_text()).body if names_of(node) & set(wanted)]
    missing = set(wanted) - {name for node in body for name in names_of(node)}
    if missing:
        sys.exit(f"{path} has no {sorted(missing)}")
    # Annotations name types that nothing here needs: this file's future import applies.
    exec(compile(ast.Module(body, []), path, "exec"), names)
    return types.SimpleNamespace(**names)


def names_of(node):
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def settings_parser(checkout, attention):
    """The program's parse_generation_parameters, with its default options."""
    options = types.SimpleNamespace(
        infotext_skip_pasting=[],
        infotext_styles="Ignore",
        auto_backcompat=True,
        use_old_hires_fix_width_height=False,
        sd_model_checkpoint="",
        forge_additional_modules=[],
    )
    shared = types.SimpleNamespace(opts=options)
    versions = {"re": re, "version": version, "shared": shared}
    wanted = ["v160", "v170_tsnr", "v180", "v180_hr_styles", "parse_version", "backcompat"]
    take_all(checkout / "modules/infotext_versions.py", wanted, versions)
    names = {
        "re": re,
        "json": json,
        "shared": shared,
        "prompt_parser": attention,
        "infotext_versions": types.SimpleNamespace(**versions),
        "main_entry": types.SimpleNamespace(module_list={}),
    }
    wanted = [
        "re_param_code",
        "re_param",
        "re_imagesize",
        "unquote",
        "restore_old_hires_fix_params",
        "parse_generation_parameters",
    ]
    path = checkout / "modules/infotext_utils.py"
    return take_all(path, wanted, names).parse_generation_parameters


def prompt_parser(checkout):
    """The program's functions for schedules, composition and attention."""
    names = {"re": re, "lark": lark, "logging": types.SimpleNamespace(debug=print_nothing)}
    wanted = [
        "schedule_parser",
        "re_AND",
        "re_weight",
        "re_attention",
        "re_break",
        "SdConditioning",
        "get_learned_conditioning_prompt_schedules",
        "get_multicond_prompt_list",
        "parse_prompt_attention",
    ]
    return take_all(checkout / "modules/prompt_parser.py", wanted, names)


def print_nothing(*_):
    pass


def reader(checkout):
    """A function from our text to what the program reads of it."""
    parser = prompt_parser(checkout)
    parse_settings = settings_parser(checkout, parser)
    options = types.SimpleNamespace(enable_prompt_comments=True)
    names = {"re": re, "shared": types.SimpleNamespace(opts=options)}
    path = checkout / "modules/processing_scripts/comments.py"
    comments = take_all(path, ["strip_comments"], names)
    names = {"re": re, "defaultdict": collections.defaultdict}
    wanted = ["ExtraNetworkParams", "re_extra_net", "parse_prompt"]
    networks = take_all(checkout / "modules/extra_networks.py", wanted, names)

    def text(prompt):
        prompt, found = networks.parse_prompt(comments.strip_comments(prompt))
        parts, texts, _ = parser.get_multicond_prompt_list([prompt])
        schedules = parser.get_learned_conditioning_prompt_schedules(texts, STEPS)
        read = [parser.parse_prompt_attention(part) for plan in schedules for _, part in plan]
        weights = [weight for row in parts for _, weight in row]
        pieces = [piece for part in read for piece in part]
        if found or len(pieces) != 1 or weights != [1.0] or pieces[0][1] != 1.0:
            return [sorted(found), weights, pieces]
        return pieces[0][0]

    def read(infotext):
        settings = parse_settings(infotext)
        prompt, negative = settings.pop("Prompt"), settings.pop("Negative prompt")
        model = settings.pop("Model", None)
        ours = {key: value for key, value in settings.items() if f"{key}: " in infotext}
        return {
            "prompt": text(prompt),
            "negative": text(negative),
            "model": model,
            "settings": ours,
        }

    return read


def main():
    # Docstrings of the programs hold backslashes.
    warnings.simplefilter("ignore", SyntaxWarning)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("forge", type=pathlib.Path)
    parser.add_argument("reforge", type=pathlib.Path)
    parser.add_argument("--commits", nargs=2, help="of the two, if they are no git work trees")
    args = parser.parse_args()
    recorded = json.loads(TARGET.read_text())
    checkouts = {"forge": args.forge, "reforge": args.reforge}
    for place, (name, checkout) in enumerate(checkouts.items()):
        given = args.commits[place] if args.commits else None
        recorded[name] = commit_of(types.SimpleNamespace(commit=given, checkout=checkout))
        read = reader(checkout)
        for case in recorded["cases"]:
            case[name] = read(case["infotext"])
    text = json.dumps(recorded, ensure_ascii=False, indent=1, sort_keys=True)
    TARGET.write_text(text + "\n")


if __name__ == "__main__":
    main()
