"""What a checkpoint costs on the file system of the store, beside copying the same state: a JSON line for each size.

    python -m tests.benchmarks.bench_checkpoint DIRECTORY [--sizes 1.3b] [--host-memory 1GiB] [--saves 5]

A GPT of random weights trains; some steps are not saved, then each is (the checkpoint before is removed, as
``ModelCheckpoint(every_n_train_steps=1)`` does), then again none. An interval reaches from the beginning of a step to
that of the next, so it has the save after the step in it, and what the save costs later: files that a checkpoint holds
cannot be written again. ``wait_s`` are updates that were owed when the save began, which it did not cause.
Afterwards the last checkpoint is copied twice: by reading and writing all its bytes, synced at the end, and by what
``lightning-ssd copy`` does, which also compares. Then the state is saved as one file, beside writing as many bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

import lightning_ssd
from lightning_ssd.convert.copy import copy_checkpoint
from lightning_ssd.sizes import MiB, fmt
from tests.benchmarks.gpt import SIZES, Module, batches, numel
from tests.benchmarks.support import emit, facts, median, plan_of, run_json, say
from tests.helpers.training import make_trainer

DISK_NBYTES_PER_PARAM = 48  # store, one checkpoint and a copy of it: 14 to 16 each
PIECE_NBYTES = 16 * MiB
TARGET_SHARE = 0.02  # of the copy's time
Line = dict[str, Any]


def main() -> None:
    """Measure and print, or, with ``--worker``, be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1.3b"])
    parser.add_argument("--precision", default="bf16-true", choices=["bf16-true", "bf16-mixed", "32-true"])
    parser.add_argument("--host-memory", default="1GiB")
    parser.add_argument("--saves", type=int, default=5, help="steps that are saved, the first of them among no others")
    parser.add_argument("--plain-steps", type=int, default=2, help="steps without a save, before and after")
    parser.add_argument("--out", help="append the lines to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        warnings.simplefilter("ignore")
        sys.stdout.write(json.dumps(measure(args)) + "\n")
        return
    for size in args.sizes:
        need, free = numel(size) * DISK_NBYTES_PER_PARAM, shutil.disk_usage(args.directory).free
        if need > free:
            raise SystemExit(
                f"size {size} needs {fmt(need)} of disk, {args.directory} has {fmt(free)} free: "
                "choose another directory, or smaller --sizes"
            )
        say(f"checkpoint: {size}")
        found = run_json([sys.executable, *sys.orig_argv[1:], "--sizes", size, "--worker"])
        options = {"precision": args.precision, "host_memory": args.host_memory, "numel": numel(size)}
        emit({"benchmark": "checkpoint", "size": size, **options, **facts(args.directory), **found}, args.out)


class Saver(pl.Callback):
    """Saves after some steps, and removes the checkpoint before; seconds and bytes of each.

    ``first`` and ``last`` are the numbers, from 0, of the first and the last step that is saved.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self.begins: list[float] = []
        self.saves: list[Line] = []
        self.newest: Path | None = None
        self._folder = folder
        self._first, self._last = first, last

    def on_train_batch_start(self, *_: Any) -> None:
        self.begins.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._first <= batch_idx <= self._last:
            return
        path = self._folder / f"step={batch_idx}.ckpt"
        wait_s = timed(trainer.strategy.session.drain)
        save_s = timed(lambda: trainer.save_checkpoint(path))
        older, self.newest = self.newest, path
        remove_s = 0.0 if older is None else timed(lambda: trainer.strategy.remove_checkpoint(older))
        files = [(found.st_size, found.st_nlink) for found in map(Path.stat, files_of(path))]
        self.saves.append(
            {
                "wait_s": wait_s,
                "save_s": save_s,
                "remove_s": remove_s,
                "written_nbytes": sum(nbytes for nbytes, num_links in files if num_links == 1),
                "linked_nbytes": sum(nbytes for nbytes, num_links in files if num_links == 2),
            }
        )


def measure(args: argparse.Namespace) -> Line:
    """Train and save, then copy."""
    # The first makes the state's files; the one after the last save and the very last one are no plain ones either.
    num_steps = 1 + args.plain_steps + args.saves + 1 + args.plain_steps + 1
    first = 1 + args.plain_steps
    folder = args.directory / f"bench-checkpoint-{os.getpid()}"
    strategy = lightning_ssd.SSDOffloadStrategy(
        nvme_path=str(args.directory), host_memory=args.host_memory, checkpoint="links"
    )
    saver = Saver(folder, first, first + args.saves - 1)
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer(args.directory, strategy, precision=args.precision, max_steps=num_steps, callbacks=[saver])
    try:
        trainer.fit(Module(args.sizes[0]), batches(num_steps))
        assert saver.newest is not None
        line = {"plan": plan_of(strategy.session), "engine": strategy.session.engine.name}
        line |= of_steps(saver, first) | of_copies(links_of(saver.newest), saver.saves)
        return line | of_one_file(trainer, saver.newest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def of_steps(saver: Saver, first: int) -> Line:
    """Seconds of the intervals with a save, and of those without."""
    intervals = [b - a for a, b in itertools.pairwise(saver.begins)]  # the last step has no end
    last = first + len(saver.saves) - 1
    # The step after the last save writes new files too: it belongs to neither.
    plain = intervals[1:first] + intervals[last + 2 :]
    saved = intervals[first : last + 1]
    repeated = saved[1:] or saved
    return {
        "saves": saver.saves,
        "plain_step_s": plain,
        "saved_step_s": saved,
        "step_after_last_save_s": intervals[last + 1],
        "first_save_s": saver.saves[0]["save_s"],
        "repeated_save_s": median(save["save_s"] for save in saver.saves[1:] or saver.saves),
        "stall_s": median(repeated) - median(plain),
    }


def of_one_file(trainer: pl.Trainer, links: Path) -> Line:
    """Seconds of a save of the same state as one file, and of writing as many bytes from memory, synced at the end."""
    path = links.with_name("file.ckpt")
    session = trainer.strategy.session
    session.settings = replace(session.settings, checkpoint="file")
    drop_cache(links_of(links))
    save_s = timed(lambda: trainer.save_checkpoint(path))
    nbytes = path.stat().st_size
    path.unlink()
    write_s = timed(lambda: write_bytes(path, nbytes))
    path.unlink()
    return {
        "file_nbytes": nbytes,
        "file_save_s": save_s,
        "file_write_s": write_s,
        "file_share_of_write": save_s / write_s,
        "load_average": os.getloadavg()[0],
    }


def write_bytes(path: Path, nbytes: int) -> None:
    buffer = os.urandom(PIECE_NBYTES)
    with path.open("wb", buffering=0) as file:
        for begin in range(0, nbytes, PIECE_NBYTES):
            file.write(buffer[: nbytes - begin])
        os.fsync(file.fileno())


def links_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.links")


def files_of(path: Path) -> list[Path]:
    return [path, *links_of(path).rglob("*.*")]


def of_copies(checkpoint: Path, saves: list[Line]) -> Line:
    """Seconds of both copies, and the share of the faster one that a save takes."""
    target = checkpoint.with_name("copy.ckpt")
    line: Line = {}
    for name, copy in {"plain": plain_copy, "checked": copy_checkpoint}.items():
        drop_cache(checkpoint)
        line[f"{name}_copy_s"] = timed(lambda copy=copy: copy(checkpoint, target))
        shutil.rmtree(target)
    line["copied_nbytes"] = sum(path.stat().st_size for path in checkpoint.rglob("*.*"))
    save_s = median(save["save_s"] for save in saves[1:] or saves)
    line["share_of_copy"] = save_s / min(line["plain_copy_s"], line["checked_copy_s"])
    line["is_within_target"] = line["share_of_copy"] <= TARGET_SHARE
    return line


def plain_copy(source: Path, target: Path) -> None:
    """Every byte read and written through one buffer, and made durable at the end."""
    buffer = memoryview(bytearray(PIECE_NBYTES))
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in files:
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb", buffering=0) as read, to.open("wb", buffering=0) as write:
            while nbytes := read.readinto(buffer):
                write.write(buffer[:nbytes])
            os.fsync(write.fileno())


def drop_cache(checkpoint: Path) -> None:
    """What training wrote past the cache would not be there either."""
    for path in checkpoint.rglob("*.*"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def timed(call: Callable[[], Any]) -> float:
    """Seconds that ``call`` takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
