"""Compiled models: whether they train as plain Lightning does with the same compile, and a step's time; a line each.

    python -m tests.benchmarks.bench_compile DIRECTORY [--backend inductor] [--out docs/results/compile.jsonl]

Three models in five spellings, a JSON line each. Plain Lightning and ours make the same steps, compiled and not, in one
process, one after the other and again (``--rounds``). A time is the median over the steps of all rounds after the first
two of each, which compile. Ours has a budget in which every step streams (``min``), or ``host_memory="auto"``, in which
nothing does. ``graphs`` is how many dynamo has compiled in the last round.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.support import emit, facts, in_own_session, median, say
from tests.helpers.models import GPT, ConvNet, ViT
from tests.helpers.training import make_trainer, streamed

NUM_COMPILING = 2  # steps
VOCAB, SEQ = 256, 64


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all tokens, or images."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


class Module(pl.LightningModule):
    """Notes losses, and when each step ends."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, cross_entropy
        self.losses: list[float] = []
        self.times: list[float] = []

    def step(self, batch: list[Tensor]) -> Tensor:
        """What the spelling "method" compiles."""
        return self.loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.step(batch)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append(time.perf_counter())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def _blocks(module: Module, backend: str) -> pl.LightningModule:
    for block in module.net.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend)
    return module


def _lightning_module(module: Module, backend: str) -> pl.LightningModule:
    compiled: pl.LightningModule = torch.compile(module, backend=backend)  # type: ignore[assignment]
    return compiled


def _network(module: Module, backend: str) -> pl.LightningModule:
    module.net = torch.compile(module.net, backend=backend)  # type: ignore[assignment]
    return module


def _function(module: Module, backend: str) -> pl.LightningModule:
    module.loss = torch.compile(cross_entropy, backend=backend)
    return module


def _method(module: Module, backend: str) -> pl.LightningModule:
    module.step = torch.compile(module.step, backend=backend)  # type: ignore[method-assign]
    return module


SPELLINGS: dict[str, Callable[[Module, str], pl.LightningModule]] = {
    "block.compile()": _blocks,
    "torch.compile(lightning_module)": _lightning_module,
    "torch.compile(network)": _network,
    "torch.compile(function)": _function,
    "torch.compile(method)": _method,
}


def _images(num: int) -> TensorDataset:
    return TensorDataset(torch.randn(num, 3, 16, 16), torch.randint(0, 10, (num,)))


def _tokens(num: int) -> TensorDataset:
    tokens = torch.randint(0, VOCAB, (num, SEQ + 1))
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], TensorDataset]]] = {
    "GPT": (lambda: GPT(vocab=VOCAB, width=128, layers=4, seq=SEQ), _tokens),
    "ViT": (lambda: ViT(width=128, layers=4), _images),
    "ConvNet, channels_last": (
        lambda: ConvNet(width=32, blocks=4).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        _images,
    ),
}


@dataclass
class Found:
    """What runs of one strategy gave.

    Attributes:
        losses: Of each step of a run.
        weights: After it.
        steps_s: Seconds of the steps that compile nothing, of all runs.
        num_graphs: That were compiled in a run.
    """

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    steps_s: list[float] = field(default_factory=list)
    num_graphs: int = 0


def train(folder: Path, model: str, strategy: Any, compiles: Callable[[Module], Any], found: Found, steps: int) -> None:
    """One run, added to ``found``."""
    make_net, make_data = MODELS[model]
    pl.seed_everything(1, verbose=False)
    module = Module(make_net())
    trainer = make_trainer(folder, strategy, max_steps=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(compiles(module), DataLoader(make_data(4 * steps), batch_size=4))
    ends = module.times[NUM_COMPILING:]
    found.losses = module.losses
    found.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
    found.steps_s += [end - begin for begin, end in itertools.pairwise(ends)]
    found.num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compare(folder: Path, model: str, spelling: str, backend: str, steps: int, rounds: int) -> dict[str, Any]:
    """The figures of one line."""
    kinds = {f"{name}{suffix}": Found() for name in ("plain", "min", "auto") for suffix in ("", " uncompiled")}
    for _ in range(rounds):
        for name, found in kinds.items():
            memory, _, is_plain = name.partition(" ")
            strategy = "auto" if memory == "plain" else streamed(host_memory=memory, min_unit_numel=10_000)
            compiles = (lambda m: m) if is_plain else (lambda m: SPELLINGS[spelling](m, backend))
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            train(folder, model, strategy, compiles, found, steps)
    line: dict[str, Any] = {}
    for name, found in kinds.items():
        key = name.replace(" ", "_")
        line |= {f"{key}_step_ms": median(found.steps_s) * 1e3, f"{key}_graphs": found.num_graphs}
        plain = kinds["plain" + name.removeprefix(name.split(" ")[0])]
        if found is not plain:
            line[f"{key}_is_equal"] = found.losses == plain.losses and all(
                torch.equal(value, plain.weights[weight]) for weight, value in found.weights.items()
            )
            pairs = zip(found.losses, plain.losses, strict=True)
            loss = max(abs(ours - its) for ours, its in pairs)
            weight = max(float((value - plain.weights[name]).abs().max()) for name, value in found.weights.items())
            line |= {f"{key}_most_loss_difference": f"{loss:.1e}", f"{key}_most_weight_difference": f"{weight:.1e}"}
    return line


def main() -> None:
    """Measure each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="on the disk that is used")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--spellings", nargs="+", choices=SPELLINGS, default=list(SPELLINGS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", help="append the lines to this file")
    args = parser.parse_args()
    in_own_session()
    for model in args.models:
        for spelling in args.spellings:
            say(f"{model}: {spelling}")
            found = compare(args.directory, model, spelling, args.backend, args.steps, args.rounds)
            line = {"benchmark": "compile", **facts(args.directory), "model": model, "spelling": spelling}
            settings = {"backend": args.backend, "steps": args.steps, "rounds": args.rounds}
            emit(line | settings | {"threads": torch.get_num_threads()} | found, args.out)


if __name__ == "__main__":
    main()
