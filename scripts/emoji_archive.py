#!/usr/bin/env python3
"""Rebuilds assets/emoji/emoji.tar, the demo's pictures, from three npm packages, byte for byte.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0 emojilib@4.0.3
    pip install -r scripts/requirements-training.txt
    python3 scripts/emoji_archive.py FOLDER_WITH_THE_PACKAGES assets/emoji/emoji.tar

One picture per subject: Microsoft's Fluent 3D emoji with their Unicode names, groups and keywords.
Left out are flags (as far as is known they are not part of Microsoft's MIT set), skin-tone variants
(one subject five times) and files with the same bytes as an earlier one. Trimming the transparent
border creates the pictures' many aspect ratios. The longer side is at most 192 px (never enlarged).
Colours with an ICC profile are converted to sRGB.

Using rectiflow does not require this script: the archive is committed. The bytes are the same only
with the pinned Pillow, whose wheel contains its own libwebp; the script reports a difference.
"""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image, ImageCms, features

LONGEST_SIDE_PX = 192
# Chosen by size: quality 78 with alpha 60 made 8.25 MB. Method 6 takes 70 times as long and saves
# 3%.
WEBP = {"format": "WEBP", "quality": 75, "alpha_quality": 50, "method": 4, "exact": False}
# Renders fade out over many nearly transparent pixels; trimming treats those as border.
VISIBLE_ALPHA = 8
ARCHIVE_LIMIT_BYTES = 8_000_000
FLUENT_TGZ = "lobehub-fluent-emoji-3d-1.1.0.tgz"
UNICODE_TGZ = "unicode-emoji-json-0.9.0.tgz"
EMOJILIB_TGZ = "emojilib-4.0.3.tgz"
SHA256 = {
    FLUENT_TGZ: "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    UNICODE_TGZ: "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    EMOJILIB_TGZ: "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
}
ARCHIVE_SHA256 = "3acd24f0520723b5f9aef4a817e70f9bb185f46bff09d06a8f42bde1195befcd"
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


def fail(text):
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)


def open_package(folder, name):
    """The members of a package as {path: bytes}; stops unless it is the pinned package."""
    path = folder / name
    if not path.is_file():
        fail(f"{path} is missing; fetch it with the `npm pack` line at the head of this script")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256[name]:
        fail(f"{path}: expected sha256 {SHA256[name]}, found {found}; fetch this exact version")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {
            m.name.removeprefix("package/"): tar.extractfile(m).read() for m in tar if m.isfile()
        }


def subjects(names, keywords, pictures):
    """Yields (hex, name, group, keywords, source bytes) of each emoji with a picture.

    The order is Unicode's.
    """
    seen = set()
    for emoji, entry in names.items():
        code = "-".join(f"{ord(c):04x}" for c in emoji)
        source = pictures.get(f"assets/{code}.webp")
        if source is None or entry["group"] == "Flags" or SKIN_TONES & set(code.split("-")):
            continue
        digest = hashlib.sha256(source).digest()
        if digest in seen:
            continue
        seen.add(digest)
        words = [word.replace("_", " ") for word in keywords.get(emoji, [])]
        yield code, entry["name"], entry["group"], list(dict.fromkeys(words)), source


def to_srgb(picture):
    """RGBA in sRGB: applies the embedded ICC profile, if any, to the colours."""
    profile = picture.info.get("icc_profile")
    picture = picture.convert("RGBA")
    if not profile:
        return picture
    colours = ImageCms.profileToProfile(
        picture.convert("RGB"),
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    colours.putalpha(picture.getchannel("A"))
    return colours


def reencode(source):
    """A picture trimmed, fitted and reencoded, as (bytes, width, height)."""
    picture = to_srgb(Image.open(io.BytesIO(source)))
    visible = picture.getchannel("A").point(lambda a: 255 if a >= VISIBLE_ALPHA else 0)
    picture = picture.crop(visible.getbbox())
    longest = max(picture.size)
    if longest > LONGEST_SIDE_PX:
        size = [max(1, round(side * LONGEST_SIDE_PX / longest)) for side in picture.size]
        # Pillow resizes RGBA with premultiplied colours: no bleeding at transparent edges.
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, **WEBP)
    return out.getvalue(), *picture.size


def add(tar, name, data):
    """Adds a member whose header depends on neither machine nor date."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    tar.addfile(info, io.BytesIO(data))


def build(folder, licence):
    """The archive's bytes and its number of subjects."""
    pictures = open_package(folder, FLUENT_TGZ)
    names = json.loads(open_package(folder, UNICODE_TGZ)["data-by-emoji.json"])
    keywords = json.loads(open_package(folder, EMOJILIB_TGZ)["dist/emoji-en-US.json"])
    index, members = [], []
    for code, name, group, words, source in subjects(names, keywords, pictures):
        data, width, height = reencode(source)
        file = f"{code}.webp"
        line = {
            "file": file,
            "name": name,
            "group": group,
            "keywords": words,
            "hex": code,
            "width_px": width,
            "height_px": height,
        }
        index.append(json.dumps(line, ensure_ascii=False) + "\n")
        members.append((file, data))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        add(tar, "LICENSE", licence)
        add(tar, "index.jsonl", "".join(index).encode())
        for name, data in members:
            add(tar, name, data)
    return out.getvalue(), len(members)


def main():
    if len(sys.argv) != 3:
        fail("usage: emoji_archive.py FOLDER_WITH_THE_PACKAGES OUT.tar")
    folder, out = map(Path, sys.argv[1:])
    licence = (Path(__file__).parent.parent / "assets/emoji/LICENSE").read_bytes()
    data, num_subjects = build(folder, licence)
    if len(data) > ARCHIVE_LIMIT_BYTES:
        fail(
            f"the archive has {len(data):,} bytes, at most {ARCHIVE_LIMIT_BYTES:,} are allowed: "
            "lower the quality in WEBP"
        )
    out.write_bytes(data)
    found = hashlib.sha256(data).hexdigest()
    print(f"{out}: {num_subjects} subjects, {len(data):,} bytes, sha256 {found}")
    if found != ARCHIVE_SHA256:
        print(
            f"note: the committed archive has sha256 {ARCHIVE_SHA256}; this Pillow has libwebp "
            f"{features.version('webp')}, and another libwebp writes other bytes",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
