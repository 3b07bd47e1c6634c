#!/usr/bin/env python3
"""Writes crates/rectiflow-data/tests/golden/tokens.jsonl.gz: 2,400 captions and their token ids.

The ids are those of Hugging Face's fast CLIP tokenizer (with BOS and EOS, untruncated); each line is
a JSON array [caption, ids]. Made with Python 3.11, transformers 5.23.0, tokenizers 0.23.3, and the
merges in assets/clip (scripts/clip_merges.py).

    python3 scripts/golden/tokens.py
"""

import gzip
import json
import random
import unicodedata
from pathlib import Path

from transformers import CLIPTokenizerFast

ROOT = Path(__file__).parent.parent.parent
TARGET = ROOT / "crates/rectiflow-data/tests/golden/tokens.jsonl.gz"
NUM_CAPTIONS = 2400

# The pools that captions are drawn from, packed.
# fmt: off
WORDS = """a an the of on in with and cat dog house tree painting photograph woman man child river mountain dress glass
masterpiece best quality 1girl solo looking_at_viewer long_hair score_9 rating_safe cinematic lighting bokeh 35mm f/1.8
hyperrealistic chiaroscuro antidisestablishmentarianism Zdzislaw Greg Rutkowski ArtStation HDR 8k 4K UHD v2.1 :3 :d ^_^
don't it's we'll they've I'm you'd she'RE rock'n'roll O'Neill ''quoted'' "quoted" (parens) [brackets] {braces} <tags>
hello,world a.b.c e.g. U.S.A. http://example.org/x?y=1&z=2 user@example.org #hashtag @mention $9.99 50% 1,000,000 3.14159
007 12345678901234567890 x2 mp3 H2O CO₂ m² ½ № ™ © ® … — – ‘single’ “double” «guillemets» ¿qué? ¡olé! ~~~ *** --- ___""".split()
ACCENTED = """café naïve façade über Ångström Łódź São Paulo señor crème brûlée Dvořák Škoda žluťoučký kůň İstanbul ısı
Việt Nam phở bò Hà Nội Đà Nẵng Ελλάδα ΣΊΣΥΦΟΣ Москва щука Ёлка Україна ქართული Հայաստան שלום עולם مرحبا بالعالم فارسی
हिन्दी नमस्ते क्षेत्र தமிழ் తెలుగు ภาษาไทย ສະບາຍດີ မြန်မာ ខ្មែរ አማርኛ ꦗꦮ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ẞ straße ﬁ ﬂ ŉ ǅ""".split()
CJK = """猫 犬と少女 日本語のキャプション カタカナ ｶﾀｶﾅ ひらがな 東京タワー 富士山 简体中文 繁體中文 龍 한국어 서울 고양이 ㄱㄴㄷ 〆切 々 ー、。「」 １２３ ＡＢＣ 𠮷野家
𝒻𝒶𝓃𝒸𝓎 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 🈶 ㊙ ㍿""".split()
EMOJI = """😀 😂 ❤️ 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇯🇵 🇩🇪 🧑‍🚀 🐈‍⬛ 🤷‍♀️ ☺ ☺️ ♥ ★ ☆ ✨ 🔥 🫠 1️⃣ #️⃣ ©️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿""".split()
ENTITIES = ["&amp;", "&lt;b&gt;", "&quot;", "&#39;", "&#x27;", "&nbsp;", "&eacute;", "&copy", "AT&T", "<br/>", "<p>text</p>"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "\x0b", "\x0c", "\x85", "\ufeff", " \t \n "]
CONTROLS = ["\x00", "\x01", "\x07", "\x1b[0m", "\x7f", "\u200d", "\u200e", "\u202e", "\ufffd", "\u00ad", "\ufff9"]
SPECIALS = ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|endoftext", "|>", "<|end of text|>", "</w>", "cat</w>",
            "<|startoftext|><|endoftext|>", "a<|endoftext|>b", " <|endoftext|> "]
FIXED = ["", " ", "\n", "\t\t", ".", "!", "!!", "!!!!!!!!", "?!", "a", "A", "i", "'", "''", "'s", "'S", "'ll've", "\u0301", "e\u0301",
         "a photo of a cat.", "A Photo Of A CAT!", "wow! a cat! (really!)", "it's John's; they're here, aren't they? I'd've",
         "x" * 1000, "ab " * 400, "1" * 300, "1 " * 300, "!" * 500, "é" * 300, "猫" * 300, "🔥" * 120, "\u0301" * 200, "a\u0301" * 200,
         "., " * 200, "word " * 74, "word " * 75, "word " * 76, "word " * 150, "word " * 225, "word " * 226, "\u1e9e\u0130\u0131\u017f",
         "\u03a3\u0391\u03a3 \u03a3", "\u212b \u2126 \ufb01", "\u1100\u1161\u11a8", "\u0958", "\u0f73", "\u2adc", "\U0001d15e"]
# fmt: on
POOLS = [WORDS, ACCENTED, CJK, EMOJI, ENTITIES, SPECIALS, CONTROLS, SPACES]


def caption(rng):
    """A random mixture: mostly plain sentences and tag lists, sometimes arbitrary characters."""
    kind = rng.randrange(6)
    length = rng.choice(
        [1, 2, 3, 5, 8, 13, 21, 34, 80, 200] if rng.random() < 0.2 else [1, 2, 3, 5, 8, 13, 21]
    )
    if kind == 0:
        text = " ".join(rng.choice(WORDS) for _ in range(length))
    elif kind == 1:
        text = ", ".join(rng.choice(WORDS + ACCENTED) for _ in range(length))
    elif kind == 2:
        text = " ".join(rng.choice(rng.choice(POOLS[:4])) for _ in range(length))
    elif kind == 3:
        text = "".join(rng.choice(rng.choice(POOLS)) for _ in range(length))
    elif kind == 4:
        text = "".join(
            rng.choice(rng.choice(POOLS)) + rng.choice(SPACES + [" "] * 20) for _ in range(length)
        )
    else:
        text = "".join(character(rng) for _ in range(length))
    form = rng.choice([None, None, "NFD", "NFC", "NFKD"])
    text = unicodedata.normalize(form, text) if form else text
    return rng.choice([str, str, str, str.upper, str.title])(text)


def character(rng):
    """A random character that is no surrogate."""
    while True:
        code = rng.randrange(rng.choice([0x80, 0x250, 0x3000, 0x10000, 0x30000]))
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def byte_letters():
    """The character that stands for each byte: printable bytes first, as in CLIP's vocabulary."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def tokenizer_of(merges):
    letters = byte_letters()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(first + second for first, second in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def main():
    text = gzip.decompress((ROOT / "assets/clip/merges.txt.gz").read_bytes()).decode()
    tokenizer = tokenizer_of([tuple(line.split(" ")) for line in text.splitlines()])
    rng = random.Random(2026)
    captions = dict.fromkeys(FIXED + [word for pool in POOLS for word in pool])
    while len(captions) < NUM_CAPTIONS:
        captions[caption(rng)] = None
    lines = []
    for text in captions:
        entry = [text, tokenizer(text).input_ids]
        lines.append(json.dumps(entry, ensure_ascii=False, separators=(",", ":")) + "\n")
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
