#!/usr/bin/env python3
"""Writes a run of W&B as the installed wandb writes it in offline mode.

    python3 scripts/golden/wandb_run.py

Needs wandb (scripts/peers/requirements-watch.txt) and no network. The run says nothing of the
machine that makes it; one of its records is longer than a block.
"""

import os
import pathlib
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "crates/rectiflow-train/tests/golden/offline.wandb"


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            host="host",
            silent=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        config = {"lr": {"peak": 1e-4}, "long": "0123456789abcdef" * 2200}
        run = wandb.init(
            project="project", id="golden01", mode="offline", config=config, settings=settings
        )
        run.define_metric("trainer/step")
        run.define_metric("*", step_metric="trainer/step")
        for step in range(1, 4):
            run.log({"loss/training": 0.1 + 0.2 * step, "trainer/step": step})
        run.log({"a": float("nan"), "b": float("inf"), "c": -float("inf"), "trainer/step": 4})
        run.finish()
        wandb.teardown()
        (found,) = pathlib.Path(folder).glob("wandb/offline-run-*/run-golden01.wandb")
        TARGET.write_bytes(found.read_bytes())
        os.chdir(HERE)


if __name__ == "__main__":
    main()
