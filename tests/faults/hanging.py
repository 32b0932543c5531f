"""A run in a process of its own, for a disk that hangs: prints what Lightning raised, and ends or not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ssd.io.engine import IOOptions
from tests.faults.support import small_gpt, streamed
from tests.helpers.training import train


def main(folder: str, engine: str, trainer: str) -> None:
    """Four steps, the third saved, all below ``folder``; the disk is given a second."""
    strategy = streamed(verify_reads=True, io=IOOptions(engine=engine, deadline_s=1.0), checkpoint="links")  # type: ignore[arg-type]
    saver = ModelCheckpoint(Path(folder) / "saved", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    try:
        train(
            Path(folder), small_gpt, strategy, max_steps=4, enable_checkpointing=True, callbacks=[saver],
            **json.loads(trainer),
        )  # fmt: skip
    except Exception as error:
        print(f"raised {type(error).__name__}: {error}", flush=True)
        raise
    print("went on", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
