"""Counts the calls of a training step of SDXL's UNet by diffusers and PyTorch, without a GPU.

    python scripts/peers/count_calls.py [--rectiflow target/release/rectiflow] [--batch 4]
        [--size 1024x1024] [--out FILE.json]

The published SDXL, random text and latents, on the device "meta": tensors have a shape and no
numbers. A `TorchDispatchMode` counts what reaches the device's kernels, operation by operation, in
the forward pass, the backward pass and the update. `rectiflow bench calls` counts the same calls of
its own step; with --rectiflow both stand beside each other.

The step is what a user writes: `UNet2DConditionModel` under autocast in bf16 with fp32 weights (or
with bf16 weights), mean squared error, `clip_grad_norm_`, `AdamW(fused=True)`. It takes the paths
of a GPU: attention by the flash kernel, foreach for the norm.

CUDA's autocast does not act on this device. Its rules for the operations of this model (PyTorch
2.13, "CUDA Ops that can autocast to float16" and "to float32") are applied by a
`TorchFunctionMode`, with its cache of weights.
"""

import argparse
import collections
import contextlib
import importlib
import json
import pathlib
import statistics
import subprocess
import time

import torch
import torch.utils.checkpoint
from diffusers import UNet2DConditionModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CONFIG = pathlib.Path(__file__).parents[2] / "crates/rectiflow-sdxl/configs/unet/config.json"
TIMED = 3
FLASH = 1


LOWER = ("linear", "conv2d", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention")
FP32 = ("layer_norm", "group_norm", "mse_loss", "softmax")


class Autocast(TorchFunctionMode):
    """Autocast's rules on a GPU, for the operations that this UNet calls."""

    def __init__(self):
        super().__init__()
        self.cached = {}

    def lower(self, x):
        if not is_float(x) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(torch.bfloat16)
        if x not in self.cached:
            self.cached[x] = x.to(torch.bfloat16)
        return self.cached[x]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        cast = None
        if name in LOWER:
            cast = self.lower
        elif name in FP32:
            cast = widen
        elif name == "cat" and any(x.dtype == torch.float32 for x in args[0]):
            args = ([widen(x) for x in args[0]], *args[1:])
        if cast:
            args = [cast(x) for x in args]
            kwargs = {key: cast(x) for key, x in kwargs.items()}
        return func(*args, **kwargs)


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def widen(x):
    return x.float() if is_float(x) else x


class Count(TorchDispatchMode):
    """Counts calls, by the part of the step and the operation."""

    def __init__(self):
        super().__init__()
        self.part = "forward"
        self.calls = collections.defaultdict(collections.Counter)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[self.part][str(func.overloadpacket).replace("aten.", "aten::")] += 1
        return func(*args, **(kwargs or {}))

    def total(self):
        return sum(sum(calls.values()) for calls in self.calls.values())


def act_as_gpu():
    """Makes the choices for tensors on "meta" that PyTorch makes for those on a GPU."""
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("_fused_sdp_choice", lambda *args, **kwargs: FLASH, allow_override=True)
    for name in ["torch.optim.optimizer", "torch.optim.adam"]:
        module = importlib.import_module(name)
        if hasattr(module, "_get_fused_kernels_supported_devices"):
            module._get_fused_kernels_supported_devices = lambda: ["meta"]
    clipping = importlib.import_module("torch.nn.utils.clip_grad")
    clipping._device_has_foreach_support = lambda device: True
    return library


class Training:
    """A UNet, its batch and its optimiser."""

    def __init__(self, args, weights, checkpointing):
        self.is_cast = weights == "fp32"
        dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        with torch.device("meta"):
            config = UNet2DConditionModel.load_config(CONFIG)
            self.unet = UNet2DConditionModel.from_config(config).to(dtype).train()
            width, height = map(int, args.size.split("x"))
            latents = (args.batch, 4, height // 8, width // 8)
            self.sample = torch.empty(latents, dtype=dtype)
            self.target = torch.empty(latents)
            self.timestep = torch.empty(args.batch)
            self.context = torch.empty(args.batch, 77, 2048, dtype=dtype)
            text, sizes = torch.empty(args.batch, 1280, dtype=dtype), torch.empty(args.batch, 6)
        self.conditions = {"text_embeds": text, "time_ids": sizes}
        if checkpointing:
            self.unet.enable_gradient_checkpointing(self.checkpoint)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, fused=True)

    def autocast(self):
        """Autocast with an empty cache, as at its beginning."""
        return Autocast() if self.is_cast else contextlib.nullcontext()

    def checkpoint(self, function, *inputs):
        """What is computed again has autocast's settings of the first time."""
        contexts = (contextlib.nullcontext(), self.autocast())
        return torch.utils.checkpoint.checkpoint(
            function, *inputs, use_reentrant=False, context_fn=lambda: contexts
        )

    def step(self, begin_part=lambda part: None):
        begin_part("forward")
        with self.autocast():
            prediction = self.unet(
                self.sample, self.timestep, self.context, added_cond_kwargs=self.conditions
            ).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), self.target)
        begin_part("backward")
        loss.backward()
        begin_part("update")
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(args, weights, checkpointing):
    training = Training(args, weights, checkpointing)
    training.step()  # what stays is allocated
    count = Count()

    def begin(part):
        count.part = part

    with count:
        training.step(begin)
    host_secs = []
    for _ in range(0 if training.is_cast else TIMED):
        began = time.perf_counter()
        training.step()
        host_secs.append(time.perf_counter() - began)
    return {
        "calls": count.total(),
        "parts": {part: sum(calls.values()) for part, calls in count.calls.items()},
        "operations": {part: dict(calls.most_common()) for part, calls in count.calls.items()},
        "host_secs": host_secs,
    }


def rectiflow(args, checkpointing):
    command = [args.rectiflow, "--json", "bench", "calls", "--batch", args.batch]
    command += ["--size", args.size, "--steps", TIMED] + ["--checkpointing"] * checkpointing
    command = list(map(str, command))
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(answer.splitlines()[-1])
    parts = {
        part: sum(found["counted"][part]["operations"].values())
        for part in ["forward", "backward", "update"]
    }
    return {**found, "parts": parts}


def row(name, found, reference):
    host = found["host_secs"]
    milliseconds = f"{1e3 * statistics.median(host):.0f}" if host else "-"
    parts = "".join(f"{found['parts'].get(part, 0):>10,}" for part in found["parts"])
    share = f"{found['calls'] / reference['calls']:.2f}" if reference else "-"
    print(f"{name:<44}{found['calls']:>10,}{parts}{milliseconds:>10}{share:>8}", flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rectiflow", type=pathlib.Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", default="1024x1024", help="width x height in pixels")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = act_as_gpu()
    print(f"torch {torch.__version__}, {args.batch} samples of {args.size}; calls, host time in ms")
    heads = ["calls", "forward", "backward", "update", "host ms", "share"]
    print(f"{'':<44}" + "".join(f"{head:>{8 if head == 'share' else 10}}" for head in heads))
    results = {}
    for checkpointing in [False, True]:
        kind = "full checkpointing" if checkpointing else "no checkpointing"
        reference = measure(args, "fp32", checkpointing)
        rows = {f"diffusers, autocast bf16, {kind}": reference}
        rows[f"diffusers, bf16 weights, {kind}"] = measure(args, "bf16", checkpointing)
        if args.rectiflow:
            rows[f"rectiflow, bf16, {kind}"] = rectiflow(args, checkpointing)
        for name, found in rows.items():
            row(name, found, reference)
        results |= rows
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    del library


if __name__ == "__main__":
    main()
