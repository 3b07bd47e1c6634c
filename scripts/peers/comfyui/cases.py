"""What is drawn by both programs: arguments of `rectiflow sample` for every setting it accepts."""

import dataclasses

SAMPLERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "ddim")
SCHEDULES = (
    "simple",
    "normal",
    "sgm_uniform",
    "beta",
    "karras",
    "exponential",
    "ddim_uniform",
    "kl_optimal",
)
PARAMETERIZATIONS = ("flow", "eps", "v", "v_ztsnr")
PROMPT = "a red apple on a white background"
NEGATIVE = "blurry"
MAX_SEED = 2**64 - 1
# Longer than three chunks of 75 tokens, and exactly as long.
LONG = "apple " * 226
FULL = "apple " * 225

TEXTS = {
    "weights": "a (red:1.4) [apple] ((big))",
    "backslashes": "a \\ b \\\\ c \\(d\\) e\\",
    "choices": "a {red|green} apple {x}",
    "escaped choices": "a \\{red\\|green\\} apple",
    "line comment": "an apple // red https://x.org/y",
    "block comment": "an /* red */ apple */ /*",
    "embedding": "embedding:apple, a embedding:b",
    "embedding, new line": "an apple\nembedding:b",
    "lines": "an apple\n\non a\ttable\n",
    "keywords": "an apple AND a pear BREAK <lora:x:1> __wild__ %date%",
    "quotes": "\"an 'apple'\" \\n \\u0041",
    "letters": "une pomme rouge, 사과, ざくろ, 🍎 ½",
    "special tokens": "an <|endoftext|> apple <|startoftext|>",
    "entities": "an apple &amp; a &#112;ear <b>",
    "75 tokens": "apple " * 75,
    "76 tokens": "apple " * 76,
    "225 tokens": FULL,
    "226 tokens": LONG,
    "empty": "",
    "ideographs": "赤い林檎",
    "invisible": "an\u200bapple \u00ad pear",
    "sigma": "ΜΗΛΟΣ",
}


@dataclasses.dataclass
class Case:
    """A picture of `rectiflow sample`."""

    kind: str
    name: str
    arguments: list[str]
    parameterization: str = "flow"
    prompts: tuple = (PROMPT,)
    negative: str = NEGATIVE


def cases():
    """All cases, by kind."""
    return [*combinations(), *values(), *texts()]


def combinations():
    """Every sampler and every schedule, for everything that a model can predict."""
    found = []
    for parameterization in PARAMETERIZATIONS:
        for sampler in SAMPLERS:
            arguments = ["--sampler", sampler]
            found.append(Case("sampler", sampler, arguments, parameterization))
        for schedule in SCHEDULES:
            arguments = ["--sampler", "dpmpp_2m", "--schedule", schedule]
            found.append(Case("schedule", schedule, arguments, parameterization))
    for sampler in SAMPLERS:
        for schedule in SCHEDULES:
            for steps in ("1", "2", "5"):
                arguments = ["--sampler", sampler, "--schedule", schedule, "--steps", steps]
                name = f"{sampler} {schedule} {steps}"
                found.append(Case("few steps", name, [*arguments, "--size", "32x32"]))
    for sampler in ("euler", "dpmpp_2m_sde", "uni_pc"):
        for schedule in ("simple", "beta"):
            arguments = ["--sampler", sampler, "--schedule", schedule, "--steps", "1000"]
            name = f"{sampler} {schedule} 1000"
            found.append(Case("many steps", name, [*arguments, "--size", "16x16"]))
    return found


def values():
    """Numbers, at their limits and beyond those of ComfyUI."""
    found = []
    for option, numbers in {
        "--cfg": ["0", "1", "1.0000000001", "4.125", "7.3333", "100", "100.5", "-1"],
        "--shift": ["0.01", "1", "3.14159", "100", "101"],
        "--pag-scale": ["0.5", "3", "100", "101", "-2"],
        "--cfg-rescale": ["0.333", "1"],
        "--seed": ["1", str(2**32), str(2**53), str(2**53 + 1), str(MAX_SEED)],
        "--batch": ["2", "5"],
        "--size": ["72x88", "16x16", "8x16", "128x64", "264x40"],
        "--original-size": ["200x150", "200x150+4+9", "16384x16384", "16385x64", "64x64+0+16385"],
        "--dtype": ["bf16"],
    }.items():
        for number in numbers:
            arguments = [f"{option}={number}"]
            found.append(Case("value", f"{option.removeprefix('--')} {number}", arguments))
    for parameterization in PARAMETERIZATIONS:
        for name, arguments in {
            "rescaled": ["--cfg-rescale=0.7"],
            "perturbed": ["--pag-scale=3"],
            "both": ["--cfg-rescale=0.7", "--pag-scale=3"],
            "perturbed, cfg 1": ["--pag-scale=3", "--cfg=1"],
            "other parts": ["--pag-scale=3", "--pag-parts=mid,up.0"],
        }.items():
            found.append(Case("guidance", name, arguments, parameterization))
    for sampler in ("euler_ancestral", "dpmpp_2m_sde"):
        for seed in (2**63, MAX_SEED):
            arguments = ["--sampler", sampler, "--seed", str(seed)]
            found.append(Case("value", f"seed {seed}, {sampler}", arguments))
    return found


def texts():
    """Prompts and negative prompts that other programs interpret."""
    found = []
    for name, text in TEXTS.items():
        found.append(Case("text", name, [], prompts=(text,)))
        found.append(Case("negative text", name, [], negative=text))
    found.append(
        Case("text", "weights, with sizes", ["--original-size=99x99"], prompts=("a (b) {c}",))
    )
    found.append(Case("text", "unread negative", ["--cfg=1"], negative=LONG))
    return found
