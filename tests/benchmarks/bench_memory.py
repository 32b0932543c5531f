"""Host memory and disk traffic of GPTs that do not fit: a JSON line for each size.

    python -m tests.benchmarks.bench_memory DIRECTORY [--sizes 124m 1.3b 4b] [--host-memory 1GiB]
    python -m tests.benchmarks.bench_memory DIRECTORY --sizes 124m --host-memory 256MiB --batch 12 --seq 768 --vocab 512
        --precision bf16-mixed --plain      # inputs of blocks past host_memory, losses beside plain Lightning's

Random weights, created in `configure_model`, AdamW, each size in a process of its own. Anonymous memory is RssAnon +
RssShmem, sampled every 10 ms, above what the process had before the Trainer was made (interpreter, torch, Lightning).
``activations_nbytes`` is the same for a model of one block without the strategy, less its weights: what the user's
compute takes however the model is stored (the gradient that is being made is in it, and no other). With ``--plain`` the
update is torch's for-loop on that side, whose bits ours are: losses are equal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_ssd
from lightning_ssd.sizes import MiB, fmt, parse_nbytes
from tests.benchmarks.gpt import GPT, SEQ, SIZES, VOCAB, Module, batches, numel
from tests.benchmarks.support import emit, facts, memory_now, plan_of, run_json, say
from tests.helpers.training import make_trainer

SLACK_NBYTES = 64 * MiB
DISK_NBYTES_PER_PARAM = 16  # master and moments 12, parameter and spilled gradient 4
PLAIN_NBYTES_PER_PARAM = {"bf16-true": 12, "bf16-mixed": 16, "32-true": 16}  # weights, gradients and moments
PLAIN_DTYPE = {"bf16-true": torch.bfloat16}
SAMPLE_S = 0.01
Line = dict[str, Any]


def main() -> None:
    """Measure and print, or, with ``--worker``, be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["124m", "1.3b", "4b"])
    parser.add_argument("--precision", default="bf16-true", choices=PLAIN_NBYTES_PER_PARAM)
    parser.add_argument("--host-memory", default="1GiB")
    parser.add_argument("--update", default="auto")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=SEQ)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--plain", action="store_true", help="run plain Lightning too and compare losses")
    parser.add_argument("--out", help="append the lines to this file")
    parser.add_argument("--worker", choices=["ours", "plain", "one-block"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        warnings.simplefilter("ignore")
        work = one_block if args.worker == "one-block" else train
        sys.stdout.write(json.dumps(work(args)) + "\n")
        return
    require_disk(args)
    for size in args.sizes:
        emit({"benchmark": "memory", "size": size, **facts(args.directory), **measure(args, size)}, args.out)


def require_disk(args: argparse.Namespace) -> None:
    """End the program if a size does not fit the disk."""
    free = shutil.disk_usage(args.directory).free
    for size in args.sizes:
        need = numel(size, args.vocab, args.seq) * DISK_NBYTES_PER_PARAM
        if need > free:
            raise SystemExit(
                f"size {size} needs {fmt(need)} of disk, {args.directory} has {fmt(free)} free: "
                "choose another directory, or smaller --sizes"
            )


def measure(args: argparse.Namespace, size: str) -> Line:
    """One size, in processes of its own."""
    say(f"memory: {size}")
    ours = worker("ours", size)
    alone = worker("one-block", size)
    total = numel(size, args.vocab, args.seq)
    itemsize = 2 if args.precision == "bf16-true" else 4  # under autocast blocks hand on float32
    line = {
        "precision": args.precision,
        "numel": total,
        "batch": args.batch,
        "seq": args.seq,
        "vocab": args.vocab,
        "host_memory": args.host_memory,
        "activations_nbytes": alone["peak_anonymous_above_base_nbytes"] - alone["weights_nbytes"],
        "block_inputs_nbytes": SIZES[size][0] * SIZES[size][1] * args.batch * args.seq * itemsize,
        "plain_at_least_nbytes": total * PLAIN_NBYTES_PER_PARAM[args.precision],
        **ours,
    }
    if args.host_memory not in ("auto", "min"):
        allowed = parse_nbytes(args.host_memory) + SLACK_NBYTES
        line["beyond_budget_and_slack_nbytes"] = ours["peak_anonymous_above_base_nbytes"] - allowed
        line["is_within"] = line["beyond_budget_and_slack_nbytes"] <= line["activations_nbytes"]
    if args.plain:
        plain = worker("plain", size)
        line["plain_peak_anonymous_above_base_nbytes"] = plain["peak_anonymous_above_base_nbytes"]
        line["plain_step_s"] = plain["step_s"]
        line["loss_difference"] = max(abs(a - b) for a, b in zip(ours["losses"], plain["losses"], strict=True))
    return line


def worker(kind: str, size: str) -> Line:
    """This program again, as a worker."""
    return run_json([sys.executable, *sys.orig_argv[1:], "--sizes", size, "--worker", kind])


def train(args: argparse.Namespace) -> Line:
    """Ours or plain."""
    is_ours = args.worker == "ours"
    strategy: Any = "auto"
    if is_ours:
        path, memory = str(args.directory), args.host_memory
        strategy = lightning_ssd.SSDOffloadStrategy(nvme_path=path, host_memory=memory, update=args.update)
    pl.seed_everything(0, verbose=False)
    module = Module(args.sizes[0], vocab=args.vocab, seq=args.seq, fused=not args.plain)
    begins: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            begins.append(time.perf_counter())

    with sampled() as peak:
        since = time.perf_counter()
        trainer = make_trainer(
            args.directory, strategy, precision=args.precision, max_steps=args.steps, callbacks=[Clock()]
        )
        trainer.fit(module, batches(args.steps, args.batch, args.seq))
        until = time.perf_counter()
    line: Line = {
        **peak,
        "setup_s": begins[0] - since,
        "step_s": [b - a for a, b in itertools.pairwise([*begins, until])],  # the last with what was owed, and teardown
        "losses": module.losses,
        "threads": torch.get_num_threads(),
    }
    if is_ours:
        stats = strategy.stats()
        line |= {"read_nbytes": stats.read_nbytes, "written_nbytes": stats.written_nbytes}
        line |= {"plan": plan_of(strategy.session), "engine": strategy.session.engine.name}
    return line


def one_block(args: argparse.Namespace) -> Line:
    """Forward and backward of one block with embedding and head, gradients dropped as they come."""
    dtype = PLAIN_DTYPE.get(args.precision, torch.float32)
    batch = next(iter(batches(1, args.batch, args.seq)))
    torch.set_default_dtype(dtype)
    with sampled() as peak:
        net = GPT(args.sizes[0], layers=1, vocab=args.vocab, seq=args.seq)
        for param in net.parameters():
            param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16-mixed"):
                logits = net(batch[0])
            logits = logits.float()
            torch.nn.functional.cross_entropy(logits.view(-1, args.vocab), batch[1].view(-1)).backward()
            del logits
    return {**peak, "weights_nbytes": sum(p.numel() * p.element_size() for p in net.parameters())}


@contextmanager
def sampled() -> Iterator[Line]:
    """Fills what it yields, at the end, with the largest memory seen inside."""
    found: Line = {}
    base, _ = memory_now()
    largest = [0, 0]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            largest[:] = map(max, largest, memory_now())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found["base_anonymous_nbytes"] = base
        found["peak_anonymous_above_base_nbytes"] = largest[0] - base
        found["peak_mapped_file_nbytes"] = largest[1]


if __name__ == "__main__":
    main()
