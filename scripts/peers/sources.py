#!/usr/bin/env python3
"""Writes a small source of pictures with each real tool and checks that all of it is found.

    python3 scripts/peers/sources.py FOLDER --program LIST_SOURCE --python ENV/bin/python \\
        --mosaic ENV/bin/python

Writers: webdataset's ShardWriter, the `tar` program with pictures before texts, hfutils' index
beside a tar (what cheesechaser reads), webshart's extractor, datasets' `to_parquet` and a file with
a page index, and MosaicML's MDSWriter. Each sample has a number in its pixels and in its caption.
The program lists the source and opens each picture; it must return the same bytes with the same
caption for each number, and no others. Exits with 1 and the differences otherwise.
"""

import argparse
import hashlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile

NUM_SAMPLES = 60


def picture(number):
    """A PNG whose first pixel is the number."""
    import PIL.Image

    image = PIL.Image.new("RGB", (16, 12), (number % 256, number // 256, 7))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def caption(number):
    return f"picture {number}, drawn by hand"


def samples():
    return [(number, picture(number), caption(number)) for number in range(NUM_SAMPLES)]


def write_webdataset(folder):
    """webdataset's own writer, two shards, JSON and text by turns."""
    import webdataset

    with webdataset.ShardWriter(str(folder / "shard-%04d.tar"), maxcount=40, verbose=0) as sink:
        for number, data, text in samples():
            fields = {"txt": text} if number % 2 else {"json": {"caption": text, "width": 16}}
            sink.write({"__key__": f"part/{number:06}", "png": data, **fields})


def write_tar(folder):
    """The tar program: all pictures, then all texts; names of more than 100 letters."""
    loose = folder / "loose"
    loose.mkdir()
    for number, data, text in samples():
        stem = f"{number:04}" + "n" * (120 if number % 9 == 0 else 0)
        (loose / f"{stem}.png").write_bytes(data)
        (loose / f"{stem}.txt").write_text(text)
    for form in ("gnu", "pax"):
        part = [path.name for path in sorted(loose.iterdir())]
        half = [name for name in part if (int(name[:4]) % 2 == 0) == (form == "gnu")]
        half.sort(key=lambda name: name.endswith(".txt"))
        command = ["tar", f"--format={form}", "-cf", folder / f"{form}.tar", "-C", loose]
        subprocess.run([*command, *half], check=True)
    shutil.rmtree(loose)


def add_members(path):
    with tarfile.open(path, "w") as tar:
        for number, data, text in samples():
            about = json.dumps({"caption": text}).encode()
            for name, content in [(f"s/{number}.png", data), (f"s/{number}.json", about)]:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_hfutils(folder):
    """The index of deepghs, which cheesechaser reads."""
    from hfutils.index import tar_create_index

    add_members(folder / "0001.tar")
    tar_create_index(str(folder / "0001.tar"))


def write_webshart(folder):
    import webshart

    add_members(folder / "0001.tar")
    place = str(folder.resolve())
    extractor = webshart.MetadataExtractor()
    extractor.extract_metadata(source=place, destination=place, include_image_geometry=True)


def write_datasets(folder):
    """Parquet as datasets writes it, and a file with a page index and small groups."""
    import datasets
    import pyarrow.parquet

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {
        "image": [{"bytes": data, "path": f"{number}.png"} for number, data, _ in samples()],
        "text": [text for _, _, text in samples()],
    }
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.select(range(30)).to_parquet(folder / "train-00000.parquet", batch_size=7)
    table = whole.select(range(30, NUM_SAMPLES)).with_format("arrow")[:]
    path = folder / "train-00001.parquet"
    small = {"row_group_size": 9, "data_page_size": 512}
    pyarrow.parquet.write_table(table, path, write_page_index=True, **small)


def write_mds(folder):
    from streaming import MDSWriter

    columns = {"image": "png", "caption": "str", "number": "int", "meta": "json"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 14) as writer:
        import PIL.Image

        for number, data, text in samples():
            image = PIL.Image.open(io.BytesIO(data))
            writer.write({"image": image, "caption": text, "number": number, "meta": {"score": 1}})


WRITERS = {
    "webdataset": write_webdataset,
    "tar": write_tar,
    "hfutils": write_hfutils,
    "webshart": write_webshart,
    "datasets": write_datasets,
    "mosaicml-streaming": write_mds,
}
MOSAIC = "mosaicml-streaming"


def found(program, folder, work):
    """The id in the caption of each sample to the sample, as the program lists it."""
    command = [program, folder, "--work", work]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    if answer.returncode != 0 or answer.stderr.strip():
        sys.exit(f"{folder}: {answer.stderr or answer.stdout}")
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    return {int(line["captions"][0].split(",")[0].split()[1]): line for line in lines}, len(lines)


def check(name, program, folder, work):
    lines, num_lines = found(program, folder, work)
    wrong = [number for number, line in lines.items() if line["captions"] != [caption(number)]]
    missing = sorted(set(range(NUM_SAMPLES)) - set(lines))
    if wrong or missing or num_lines != NUM_SAMPLES:
        sys.exit(f"{name}: wrong {wrong}, missing {missing}, {num_lines} of {NUM_SAMPLES}")
    hashes = json.loads((folder.parent / f"{name}.json").read_text())
    other = [number for number, line in lines.items() if line["sha256"] != hashes[str(number)]]
    if other:
        sys.exit(f"{name}: other bytes in {other}")
    print(f"{name}: {num_lines} pictures with their captions")


def write(name, folder):
    """Writes a source, in its tool's environment. MDS encodes again: its bytes are asked of it."""
    folder.mkdir(parents=True)
    WRITERS[name](folder)
    hashes = {number: hashlib.sha256(data).hexdigest() for number, data, _ in samples()}
    if name == MOSAIC:
        import PIL.Image
        from streaming.base.format.mds.encodings import mds_encode

        for number, data, _ in samples():
            stored = mds_encode("png", PIL.Image.open(io.BytesIO(data)))
            hashes[number] = hashlib.sha256(stored).hexdigest()
    (folder.parent / f"{name}.json").write_text(json.dumps(hashes))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--program", help="target/release/examples/list_source")
    parser.add_argument("--python", help="an environment with all tools but MosaicML's")
    parser.add_argument("--mosaic", help="an environment with mosaicml-streaming")
    parser.add_argument("--write", choices=WRITERS)
    args = parser.parse_args()
    if args.write:
        write(args.write, args.folder)
        return
    shutil.rmtree(args.folder, ignore_errors=True)
    for name in WRITERS:
        python = args.mosaic if name == MOSAIC else args.python
        folder = args.folder / name
        subprocess.run([python, __file__, folder, "--write", name], check=True)
        check(name, args.program, folder, args.folder / "work")


if __name__ == "__main__":
    main()
