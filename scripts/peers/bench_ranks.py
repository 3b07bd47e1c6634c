"""Weak scaling of PyTorch's FSDP2 on a UNet, each rank on a core of its own: the peer of `rectiflow bench ranks`.

    python scripts/peers/bench_ranks.py UNET [--ranks 1,2] [--steps 20] [--micro-batches 2] [--micro-batch 4]
        [--size 128x128] [--sync once|each] [--dtype bf16|fp32] [--out FILE.json]
    python scripts/peers/bench_ranks.py UNET --wire

UNET is a folder with diffusers' config.json; weights are random, data are noise. Every transformer and resnet block is
a unit of its own, parameters in --dtype and gathered once a step (no resharding in between, which costs memory and saves
bytes), gradients reduced in fp32: after every micro-batch (`each`, as the article's trainer did) or once a step (`once`,
set_requires_gradient_sync). AdamW, clipping to 1. Three steps warm up. Printed are medians over the steps as rank 0 sees
them, and the bytes over the loopback interface by step, both ranks' together. With --wire only the link is measured: what two
ranks can send to each other with Gloo, MB a second and microseconds until the first byte is there.
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
        if isinstance(module, (BasicTransformerBlock, ResnetBlock2D)):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return fully_shard(unet, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def wire(args):
    """An exchange of pieces, as rectiflow reduces gradients with Gloo: of one number and of 4 MiB."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    secs = {}
    for numbers in (1, 1 << 20):
        sent, found = torch.zeros(2 * numbers), torch.zeros(2 * numbers)
        times = []
        for _ in range(50):
            dist.barrier()
            began = time.perf_counter()
            dist.all_to_all_single(found, sent)
            times.append(time.perf_counter() - began)
        secs[numbers] = statistics.median(times)
    if dist.get_rank() == 0:
        megabytes = 4 * (1 << 20) / 1e6
        print(
            json.dumps(
                {"mb_per_sec": megabytes / (secs[1 << 20] - secs[1]), "microseconds": 1e6 * secs[1]}
            )
        )
    dist.destroy_process_group()


def worker(args):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    ranks = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    unet = make_unet(args.unet)
    config = unet.config
    unet = shard(unet, ranks, dtype)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.1)
    width, height = (int(side) // 8 for side in args.size.split("x"))
    batch = args.micro_batch
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    sizes = [
        (batch, 4, height, width),
        (batch, 77, config.cross_attention_dim),
        (batch, pooled),
        (batch, 6),
    ]
    x, context, text, ids = (torch.randn(size, dtype=dtype) for size in sizes)
    target, times = torch.randn(sizes[0]), torch.rand(batch, dtype=dtype) * 1000
    secs, sent = [], 0
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            dist.barrier()
            sent = loopback_bytes()
        began = time.perf_counter()
        for micro_batch in range(args.micro_batches):
            is_last = micro_batch + 1 == args.micro_batches
            unet.set_requires_gradient_sync(args.sync == "each" or is_last)
            unet.set_reshard_after_backward(is_last)
            out = unet(
                x, times, context, added_cond_kwargs={"text_embeds": text, "time_ids": ids}
            ).sample
            torch.nn.functional.mse_loss(out.float(), target).div(args.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        secs.append(time.perf_counter() - began)
    dist.barrier()
    sent = loopback_bytes() - sent
    if dist.get_rank() == 0:
        print(
            json.dumps(
                {
                    "step_secs": statistics.median(secs[WARM_UP:]),
                    "loopback_step_bytes": sent / args.steps,
                }
            )
        )
    dist.destroy_process_group()


def launch(ranks):
    """Starts this script once for each rank, on a core of its own; what rank 0 has measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = []
    for rank in range(ranks):
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
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
    if args.worker:
        return wire(args) if args.wire else worker(args)
    if args.wire:
        return print(json.dumps(launch(2)))
    rows = [run(args, int(ranks)) for ranks in args.ranks.split(",")]
    one = rows[0]["samples_per_sec"] / rows[0]["ranks"]
    for row in rows:
        row["efficiency"] = row["samples_per_sec"] / row["ranks"] / one
        print(json.dumps(row))
    if args.out:
        settings = {
            name: value for name, value in vars(args).items() if name not in ("out", "worker")
        }
        pathlib.Path(args.out).write_text(
            json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
