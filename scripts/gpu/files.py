"""PNG and safetensors files with Python's own modules, for machines that have nothing else."""

import array
import json
import random
import struct
import sys
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_png(path, width, height, rows):
    """Writes rows of RGB bytes."""
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows), 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    with open(path, "wb") as file:
        file.write(SIGNATURE)
        for name, content in chunks:
            checksum = zlib.crc32(name + content)
            file.write(struct.pack(">I", len(content)) + name + content)
            file.write(struct.pack(">I", checksum))


def read_png(path):
    """Returns width, height and the bytes of all pixels of a PNG of 8 bits a channel, not
    interlaced."""
    data = path.read_bytes()
    if data[:8] != SIGNATURE:
        raise ValueError(f"{path} is no PNG")
    at, packed, header = 8, b"", None
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        name, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if name == b"IHDR":
            header = struct.unpack(">IIBBBBB", content)
        elif name == b"IDAT":
            packed += content
        at += 12 + length
    width, height, depth, color, _, _, interlaced = header
    channels = {0: 1, 2: 3, 6: 4}.get(color)
    if depth != 8 or channels is None or interlaced:
        raise ValueError(f"{path}: expected 8 bits a channel without a palette, found {header}")
    return width, height, unfiltered(zlib.decompress(packed), width * channels, height, channels)


def unfiltered(data, stride, height, channels):
    """Undoes the filters of a PNG's rows."""
    found = bytearray()
    above = bytearray(stride)
    for y in range(height):
        kind = data[y * (stride + 1)]
        row = bytearray(data[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        for x in range(stride):
            left = row[x - channels] if x >= channels else 0
            corner = above[x - channels] if x >= channels else 0
            row[x] = (row[x] + predicted(kind, left, above[x], corner)) & 255
        found += row
        above = row
    return found


def predicted(kind, left, up, corner):
    if kind == 0:
        return 0
    if kind == 1:
        return left
    if kind == 2:
        return up
    if kind == 3:
        return (left + up) // 2
    estimate = left + up - corner
    near = [(abs(estimate - value), order) for order, value in enumerate((left, up, corner))]
    return (left, up, corner)[min(near)[1]]


def draw_pictures(folder, count, side):
    """Draws captioned discs on noisy grounds."""
    folder.mkdir(parents=True, exist_ok=True)
    colors = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}
    rng = random.Random(1)
    for i in range(count):
        (front, on), (back, under) = rng.sample(sorted(colors.items()), 2)
        center = 0.3 + 0.4 * rng.random()
        noise = rng.randbytes(3 * side)
        rows = []
        for y in range(side):
            row = bytearray()
            for x in range(side):
                inside = (x / side - center) ** 2 + (y / side - 0.5) ** 2 < 0.06
                row += bytes(on if inside else under)
            rows.append(
                bytes((value + (dot >> 4)) & 255 for value, dot in zip(row, noise, strict=True))
            )
        write_png(folder / f"{i:05}.png", side, side, rows)
        (folder / f"{i:05}.txt").write_text(f"a {front} disc on a {back} background")


def write_tensors(path, tensors):
    """Writes (name, shape, fp32 numbers) to a safetensors file."""
    header, body = {}, b""
    for name, shape, numbers in tensors:
        data = array.array("f", numbers)
        if sys.byteorder == "big":
            data.byteswap()
        start = len(body)
        body += data.tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(body)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def read_tensor(path, name):
    """Returns the numbers of an fp16, bf16 or fp32 tensor of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    start, end = (8 + length + offset for offset in entry["data_offsets"])
    content = data[start:end]
    if entry["dtype"] == "BF16":
        halves = struct.unpack(f"<{len(content) // 2}H", content)
        content = struct.pack(f"<{len(halves)}I", *(half << 16 for half in halves))
    code, size = ("e", 2) if entry["dtype"] == "F16" else ("f", 4)
    return struct.unpack(f"<{len(content) // size}{code}", content)


def batch_tensors(config, batch, side):
    """Returns a random batch as `rectiflow bench step --input` reads it."""
    rng = random.Random(7)

    def normal(name, *shape):
        count = 1
        for size in shape:
            count *= size
        return name, list(shape), [rng.gauss(0, 1) for _ in range(count)]

    text = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    channels = config["in_channels"]
    return [
        normal("sample", batch, channels, side, side),
        ("timestep", [batch], [1000 * rng.random() for _ in range(batch)]),
        normal("context", batch, 77, config["cross_attention_dim"]),
        normal("text_embeds", batch, text),
        ("time_ids", [batch, 6], [8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side] * batch),
        normal("target", batch, channels, side, side),
    ]
