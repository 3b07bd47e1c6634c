"""Weak scaling of PyTorch's FSDP2 on a UNet, one core per rank: peer of `rectiflow bench ranks`.

    python scripts/peers/bench_ranks.py UNET [--ranks 1,2] [--steps 20] [--micro-batches 2]
        [--micro-batch 4] [--size 128x128] [--sync once|each] [--dtype bf16|fp32] [--out FILE.json]
    python scripts/peers/bench_ranks.py UNET --wire

UNET is a folder with diffusers' config.json; weights are random, data are noise. Every transformer
and resnet block is a unit of its own. Parameters are in --dtype and gathered once per step (no
resharding in between, which costs memory and saves bytes). Gradients are reduced in fp32: after
every micro-batch (`each`, as the article's trainer did) or once per step (`once`,
set_requires_gradient_sync). AdamW, clipping to 1. Three steps warm up. The output has medians over
the steps as rank 0 sees them, and the bytes per step over the loopback interface, both ranks'
together. --wire measures the link only: how much two ranks can send each other with Gloo, in MB per
second, and the microseconds until the first byte arrives.
"""

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time

WARM_UP = 3
# Numbers per message: one, and 4 MiB of fp32.
SHORT, LONG = 1, 1 << 20


def loopback_bytes():
    return int(pathlib.Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def make_unet(folder):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))


def shard(unet, ranks, dtype):
    import torch
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in list(unet.modules()):
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return fully_shard(unet, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def exchange_secs(numbers):
    """The median time of an exchange of pieces, as rectiflow reduces gradients with Gloo."""
    import torch
    import torch.distributed as dist

    sent, found = torch.zeros(2 * numbers), torch.zeros(2 * numbers)
    times = []
    for _ in range(50):
        dist.barrier()
        began = time.perf_counter()
        dist.all_to_all_single(found, sent)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def wire():
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    short, long = exchange_secs(SHORT), exchange_secs(LONG)
    if dist.get_rank() == 0:
        mb_per_sec = 4 * LONG / 1e6 / (long - short)
        print(json.dumps({"mb_per_sec": mb_per_sec, "microseconds": 1e6 * short}))
    dist.destroy_process_group()


def random_batch(args, config, dtype):
    """The UNet's arguments, by name, and a target."""
    import torch

    width, height = (int(side) // 8 for side in args.size.split("x"))
    batch = args.micro_batch
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    latents = (batch, 4, height, width)
    x = torch.randn(latents, dtype=dtype)
    context = torch.randn((batch, 77, config.cross_attention_dim), dtype=dtype)
    text = torch.randn((batch, pooled), dtype=dtype)
    ids = torch.randn((batch, 6), dtype=dtype)
    target = torch.randn(latents)
    inputs = {
        "sample": x,
        "timestep": torch.rand(batch, dtype=dtype) * 1000,
        "encoder_hidden_states": context,
        "added_cond_kwargs": {"text_embeds": text, "time_ids": ids},
    }
    return inputs, target


def train_step(unet, optimizer, inputs, target, args):
    import torch

    for micro_batch in range(args.micro_batches):
        is_last = micro_batch + 1 == args.micro_batches
        unet.set_requires_gradient_sync(args.sync == "each" or is_last)
        unet.set_reshard_after_backward(is_last)
        out = unet(**inputs).sample
        torch.nn.functional.mse_loss(out.float(), target).div(args.micro_batches).backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def worker(args):
    """One rank; rank 0 prints the median step and the bytes per step."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    unet = make_unet(args.unet)
    config = unet.config
    unet = shard(unet, int(os.environ["WORLD_SIZE"]), dtype)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.1)
    inputs, target = random_batch(args, config, dtype)
    secs, sent = [], 0
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            dist.barrier()
            sent = loopback_bytes()
        began = time.perf_counter()
        train_step(unet, optimizer, inputs, target, args)
        secs.append(time.perf_counter() - began)
    dist.barrier()
    sent = loopback_bytes() - sent
    if dist.get_rank() == 0:
        step_secs = statistics.median(secs[WARM_UP:])
        print(json.dumps({"step_secs": step_secs, "loopback_step_bytes": sent / args.steps}))
    dist.destroy_process_group()


def launch(ranks):
    """Starts this script once per rank, each on a core of its own; returns rank 0's answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in range(ranks):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = ["taskset", "--cpu-list", str(rank), sys.executable, *sys.argv, "--worker"]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"a rank of {ranks} failed")
    return json.loads(outputs[0].splitlines()[-1])


def run(args, ranks):
    measured = launch(ranks)
    samples = ranks * args.micro_batches * args.micro_batch
    return {"ranks": ranks, **measured, "samples_per_sec": samples / measured["step_secs"]}


def compare_ranks(args):
    rows = [run(args, int(ranks)) for ranks in args.ranks.split(",")]
    one = rows[0]["samples_per_sec"] / rows[0]["ranks"]
    for row in rows:
        row["efficiency"] = row["samples_per_sec"] / row["ranks"] / one
        print(json.dumps(row))
    if args.out:
        arguments = vars(args).items()
        settings = {name: value for name, value in arguments if name not in ("out", "worker")}
        record = {"settings": settings, "rows": rows}
        pathlib.Path(args.out).write_text(json.dumps(record, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("unet")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--sync", choices=["once", "each"], default="once")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--out")
    parser.add_argument("--wire", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker and args.wire:
        wire()
    elif args.worker:
        worker(args)
    elif args.wire:
        print(json.dumps(launch(2)))
    else:
        compare_ranks(args)


if __name__ == "__main__":
    main()
