#!/usr/bin/env python3
"""Writes a small source of pictures with each real tool and checks that all of it is found.

    python3 scripts/peers/sources.py FOLDER --program LIST_SOURCE --python ENV/bin/python \\
        --mosaic ENV/bin/python [--kohya SD_SCRIPTS]

Writers: webdataset's ShardWriter, the `tar` program with pictures before texts, hfutils' index
beside a tar (what cheesechaser reads), webshart's extractor, datasets' `to_parquet` and a file with
a page index, MosaicML's MDSWriter, and the scripts of kohya's sd-scripts that merge captions and
tags, from a checkout. Folders with metadata for datasets' `imagefolder` are written here and read
by datasets too, which must pair as the program does. Each sample has a number in its pixels and in
its caption. The program lists the source and opens each picture; it must return the same bytes with
the same caption for each number, and no others. Exits with 1 and the differences otherwise.
"""

import argparse
import ast
import hashlib
import io
import json
import os
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


def write_imagefolder(folder):
    """Folders with a table of each format, which datasets reads as well."""
    import datasets
    import pandas

    rows = []
    for number, data, text in samples():
        form = ("jsonl", "csv", "parquet")[number % 3]
        path = folder / form / f"sub/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        rows.append({"form": form, "file_name": f"sub/{number}.png", "text": text})
    for form in ("jsonl", "csv", "parquet"):
        table = pandas.DataFrame([row for row in rows if row["form"] == form])
        table = table[["file_name", "text"]]
        path = folder / form / f"metadata.{form}"
        if form == "jsonl":
            table.to_json(path, orient="records", lines=True)
        elif form == "csv":
            table.to_csv(path, index=False)
        else:
            table.to_parquet(path)
        cache = folder.parent / "datasets-cache"
        own = datasets.load_dataset(
            "imagefolder", data_dir=str(folder / form), split="train", cache_dir=str(cache)
        )
        for row in own:
            red, green, _ = row["image"].getpixel((0, 0))
            if row["text"] != caption(red + 256 * green):
                sys.exit(f"datasets pairs {row['text']!r} with picture {red + 256 * green}")


def write_kohya(folder):
    """meta_cap.json by the scripts of a checkout in KOHYA. They import all of the trainer for one
    function, so a library with this function alone stands in for it."""
    checkout = pathlib.Path(os.environ["KOHYA"])
    source = (checkout / "library/train_util.py").read_text()
    parts = []
    for node in ast.parse(source).body:
        names = [target.id for target in getattr(node, "targets", []) if hasattr(target, "id")]
        if getattr(node, "name", "") == "glob_images_pathlib" or "IMAGE_EXTENSIONS" in names:
            parts.append(ast.get_source_segment(source, node))
    library = folder.parent / "kohya-library/library"
    library.mkdir(parents=True, exist_ok=True)
    (library / "train_util.py").write_text("\n".join(parts))
    (library / "utils.py").write_text("def setup_logging():\n    pass\n")

    texts = []
    for number, data, text in samples():
        path = folder / f"{number % 3 + 2}_part" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".caption").write_text(text)
        path.with_suffix(".txt").write_text(f"1girl, solo, number_{number}")
        texts += [path.with_suffix(".caption"), path.with_suffix(".txt")]
    environment = {**os.environ, "PYTHONPATH": str(library.parent)}
    meta = folder.resolve() / "meta_cap.json"
    for script in ("merge_captions_to_metadata", "merge_dd_tags_to_metadata"):
        command = [sys.executable, checkout / f"finetune/{script}.py", folder.resolve(), meta]
        options = ["--full_path", "--recursive"]
        subprocess.run([*command, *options], env=environment, check=True, capture_output=True)
    clean = [sys.executable, checkout / "finetune/clean_captions_and_tags.py", meta, meta]
    subprocess.run(clean, env=environment, check=True, capture_output=True)
    for path in texts:
        path.unlink()


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
    "imagefolder": write_imagefolder,
    "kohya": write_kohya,
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
    parser.add_argument("--kohya", help="a checkout of kohya's sd-scripts")
    parser.add_argument("--write", choices=WRITERS)
    args = parser.parse_args()
    if args.write:
        write(args.write, args.folder)
        return
    shutil.rmtree(args.folder, ignore_errors=True)
    if args.kohya:
        os.environ["KOHYA"] = str(pathlib.Path(args.kohya).resolve())
    for name in WRITERS:
        if name == "kohya" and not args.kohya:
            print("kohya: not run; KOHYA=FOLDER names a checkout of sd-scripts")
            continue
        python = args.mosaic if name == MOSAIC else args.python
        folder = args.folder / name
        subprocess.run([python, __file__, folder, "--write", name], check=True)
        check(name, args.program, folder, args.folder / "work")


if __name__ == "__main__":
    main()
