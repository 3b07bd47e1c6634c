#!/usr/bin/env python3
"""Writes small ONNX models, pictures, and what Python's onnxruntime returns for them.

    python3 scripts/golden/onnx_models.py crates/rectiflow-annotate/tests/golden

Made with onnx 1.23.2, onnxruntime 1.31.1, numpy 2.5.5 and pillow 13.0.0. The weights are those of a
seed. `tagger` is prepared as dghs-imgutils 0.19.0 prepares pictures for WD taggers
(`imgutils/tagging/wd14.py`): padded to a white square, bicubic, blue first, 0 to 255. `heavy` and
`light` are for measuring: `heavy` uses the same weights in each of its layers, and so is small.
"""

import json
import pathlib
import sys
import zlib

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
BYTES, LONG = TensorProto.UINT8, TensorProto.INT64
RATINGS = ["general", "sensitive", "questionable", "explicit"]
TAGS = ["1girl", "long_hair", "blue_eyes", ">_<", "^_^", "sky", "smile", "outdoors"]
CHARACTERS = ["hatsune_miku", "kagamine_rin_(append)"]


class Graph:
    """A graph that grows from its input to its output."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.nodes, self.weights, self.count = [], [], 0

    def constant(self, array):
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape):
        fan_in = int(np.prod(shape[1:])) or 1
        return self.constant((self.random.standard_normal(shape) * fan_in**-0.5).astype(np.float32))

    def node(self, kind, *inputs, **attributes):
        self.count += 1
        name = f"x{self.count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def conv(self, at, weight, stride=1, pads=1):
        return self.node("Conv", at, weight, strides=[stride] * 2, pads=[pads] * 4)

    def head(self, at, width, num_outputs):
        """Global average, then a linear layer."""
        at = self.node("Flatten", self.node("GlobalAveragePool", at))
        bias = self.constant(self.random.standard_normal(num_outputs).astype(np.float32))
        return self.node("Gemm", at, self.weight(num_outputs, width), bias, transB=1)

    def save(self, path, inputs, outputs):
        """`inputs` and `outputs`: name, type, shape. Outputs name what computes them."""
        renamed = [helper.make_node("Identity", [source], [name]) for name, _, _, source in outputs]
        graph = helper.make_graph(
            self.nodes + renamed,
            path.stem,
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape, _ in outputs],
            self.weights,
        )
        opset = [helper.make_opsetid("", 17)]
        options = {"opset_imports": opset, "ir_version": 9, "producer_name": "rectiflow"}
        model = helper.make_model(graph, **options)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def tagger(path):
    """A WD tagger's interface: NHWC, probabilities, and a second output."""
    graph = Graph(1)
    scale = graph.constant(np.float32(1 / 127.5))
    at = graph.node("Transpose", graph.node("Mul", "input", scale), perm=[0, 3, 1, 2])
    at = graph.node("Relu", graph.conv(at, graph.weight(16, 3, 3, 3), stride=2))
    at = graph.node("Relu", graph.conv(at, graph.weight(16, 16, 3, 3), stride=2))
    count = len(RATINGS) + len(TAGS) + len(CHARACTERS)
    logits = graph.head(at, 16, count)
    # Far from 0, so that some tags pass their thresholds and others do not.
    spread = graph.node("Mul", logits, graph.constant(np.float32(3)))
    output = graph.node("Sigmoid", spread)
    shape = ["batch_size", 64, 64, 3]
    outputs = [
        ("output", FLOAT, ["batch_size", count], output),
        ("embedding", FLOAT, ["batch_size", 16, 16, 16], at),
    ]
    graph.save(path, [("input", FLOAT, shape)], outputs)


def network(seed, path, batch, size, num_outputs, kind=FLOAT):
    """A head on NCHW pictures of `size`, width and height, or open where None."""
    graph = Graph(seed)
    at = "pixels" if kind == FLOAT else graph.node("Cast", "pixels", to=FLOAT)
    at = graph.node("Relu", graph.conv(at, graph.weight(12, 3, 3, 3), stride=2))
    at = graph.node("Relu", graph.conv(at, graph.weight(12, 12, 3, 3)))
    at = graph.head(at, 12, num_outputs)
    if kind == HALF:
        at = graph.node("Cast", at, to=HALF)
    width, height = size
    shape = [batch, 3, height or "height", width or "width"]
    graph.save(path, [("pixels", kind, shape)], [("score", kind, [batch, num_outputs], at)])


def of_bytes(path):
    """Takes bytes, NHWC, and returns one number without a second dimension."""
    graph = Graph(4)
    at = graph.node("Cast", "image", to=FLOAT)
    at = graph.node("Mul", at, graph.constant(np.float32(1 / 255)))
    at = graph.node("Transpose", at, perm=[0, 3, 1, 2])
    at = graph.conv(at, graph.weight(8, 3, 5, 5), stride=2, pads=2)
    at = graph.head(graph.node("Relu", at), 8, 1)
    at = graph.node("Squeeze", at, graph.constant(np.array([1], np.int64)))
    graph.save(path, [("image", BYTES, ["n", 32, 32, 3])], [("score", FLOAT, ["n"], at)])


def of_text(path):
    graph = Graph(5)
    at = graph.node("Cast", "input_ids", to=FLOAT)
    at = graph.node("ReduceMean", at, axes=[1])
    shape = ["n", 77]
    graph.save(path, [("input_ids", LONG, shape)], [("score", FLOAT, ["n", 1], at)])


def detector(path):
    graph = Graph(6)
    at = graph.conv("images", graph.weight(6, 3, 3, 3), stride=8)
    at = graph.node("Reshape", at, graph.constant(np.array([0, 6, -1], np.int64)))
    shape = ["n", 3, 64, 64]
    graph.save(path, [("images", FLOAT, shape)], [("boxes", FLOAT, ["n", 6, 64], at)])


def two_inputs(path):
    graph = Graph(7)
    at = graph.head(graph.conv("a", graph.weight(4, 3, 3, 3)), 4, 1)
    other = graph.head(graph.conv("b", graph.weight(4, 3, 3, 3)), 4, 1)
    at = graph.node("Add", at, other)
    inputs = [(name, FLOAT, ["n", 3, 8, 8]) for name in "ab"]
    graph.save(path, inputs, [("score", FLOAT, ["n", 1], at)])


def light(path):
    """About a millisecond a picture."""
    graph = Graph(8)
    at = graph.node("Relu", graph.conv("pixels", graph.weight(16, 3, 4, 4), stride=4, pads=0))
    at = graph.node("Relu", graph.conv(at, graph.weight(16, 16, 3, 3), stride=2))
    at = graph.head(at, 16, 1)
    shape = ["n", 3, 224, 224]
    graph.save(path, [("pixels", FLOAT, shape)], [("score", FLOAT, ["n", 1], at)])


def heavy(path):
    """More than 200 ms a picture: one layer, many times."""
    graph = Graph(9)
    at = graph.node("Relu", graph.conv("pixels", graph.weight(32, 3, 4, 4), stride=2, pads=1))
    shared = graph.weight(32, 32, 3, 3)
    for _ in range(24):
        # A residual, so that the numbers stay in range.
        step = graph.node("Relu", graph.conv(at, shared))
        at = graph.node("Add", at, graph.node("Mul", step, graph.constant(np.float32(0.1))))
    at = graph.head(at, 32, 1)
    shape = ["n", 3, 448, 448]
    graph.save(path, [("pixels", FLOAT, shape)], [("score", FLOAT, ["n", 1], at)])


def pictures(folder):
    """Pictures of formulas, of several shapes; one has transparent pixels."""
    found = {}
    for name, (width, height) in {
        "wide.png": (150, 90),
        "high.png": (70, 131),
        "square.png": (64, 64),
        "clear.png": (96, 60),
    }.items():
        y, x = np.mgrid[0:height, 0:width]
        red = 127 + 120 * np.sin(x / 9 + y / 31)
        green = (x * 255) // width
        blue = 127 + 120 * np.cos(y / 5) * np.sin(x / 17)
        image = Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))
        if name == "clear.png":
            alpha = (255 * y // height).astype(np.uint8)
            image.putalpha(Image.fromarray(alpha))
        image.save(folder / name, optimize=True)
        found[name] = on_white(folder / name)
    return found


def on_white(path):
    image = Image.open(path)
    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return white.convert("RGB")


def padded(image, side):
    """As wd14.py: the picture in the middle of a white square, bicubic."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return square.resize((side, side), Image.Resampling.BICUBIC) if longest != side else square


def cropped(image, side, share):
    """As torchvision's Resize of the shorter side and CenterCrop."""
    shorter = int(side / share)
    width, height = image.size
    size = (shorter, shorter * height // width)
    if height < width:
        size = (shorter * width // height, shorter)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return image.crop((left, top, left + side, top + side))


def normalised(image, mean, std):
    """[1, 3, h, w], as torchvision's ToTensor and Normalize."""
    values = np.asarray(image, np.float32) * np.float32(1 / 255)
    values = (values - np.float32(mean)) / np.float32(std)
    return values.transpose(2, 0, 1)[None]


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALVES = ([0.5] * 3, [0.5] * 3)


def resized(found):
    """CRC-32 of Pillow's resizes, by picture, filter and size."""
    sums = {}
    for picture, image in found.items():
        for name in ["BILINEAR", "BICUBIC", "LANCZOS"]:
            for size in [(17, 11), (224, 224), (100, 20), (20, 100), (64, 90), (96, 64), (300, 7)]:
                pixels = image.resize(size, Image.Resampling[name]).tobytes()
                sums[f"{picture} {name.lower()} {size[0]}x{size[1]}"] = zlib.crc32(pixels)
    return sums


def inputs_of(name, image):
    """What the model of this name takes for a picture."""
    if name == "tagger":
        return np.asarray(padded(image, 64), np.float32)[None, :, :, ::-1]
    if name == "quality":
        return normalised(cropped(image, 56, 0.875), *IMAGENET)
    if name == "bytes":
        return np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))[None]
    size = {"classes": (48, 32), "half": (40, 40), "open": (44, 36)}[name]
    values = normalised(image.resize(size, Image.Resampling.BICUBIC), *HALVES)
    return values.astype(np.float16) if name == "half" else values


def selected_tags(path):
    lines = ["tag_id,name,category,count"]
    for category, names in ((9, RATINGS), (0, TAGS), (4, CHARACTERS)):
        lines += [f"{1000 * category + n},{name},{category},1" for n, name in enumerate(names)]
    path.write_text("\n".join(lines) + "\n")


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    tagger(folder / "tagger.onnx")
    network(2, folder / "quality.onnx", "n", (56, 56), 1)
    network(3, folder / "classes.onnx", 1, (48, 32), 10)
    network(10, folder / "half.onnx", "n", (40, 40), 3, HALF)
    network(11, folder / "open.onnx", "n", (None, None), 2)
    of_bytes(folder / "bytes.onnx")
    of_text(folder / "text.onnx")
    detector(folder / "detector.onnx")
    two_inputs(folder / "two_inputs.onnx")
    light(folder / "light.onnx")
    heavy(folder / "heavy.onnx")
    selected_tags(folder / "selected_tags.csv")
    expected = {}
    for name in ["tagger", "quality", "classes", "half", "open", "bytes"]:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        entry = session.get_inputs()[0].name
        expected[name] = {}
        for picture, image in pictures(folder).items():
            output = session.run(None, {entry: inputs_of(name, image)})[0]
            expected[name][picture] = [float(number) for number in np.ravel(output)]
    (folder / "outputs.json").write_text(json.dumps(expected, indent=1) + "\n")
    sums = resized(pictures(folder))
    (folder / "resized.json").write_text(json.dumps(sums, indent=1) + "\n")


if __name__ == "__main__":
    main()
