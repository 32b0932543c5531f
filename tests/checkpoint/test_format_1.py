"""A checkpoint that lightning_ssd wrote in format 1 is read for ever, and training goes on from it as it did then.

``data/format_1/last.ckpt`` was written by commit a9b7310 with ``python -m tests.checkpoint.test_format_1 DIRECTORY``,
``after.safetensors`` holds the weights and masters of the same run two steps later. The gradients are small dyadic
numbers whatever the weights are, so every machine computes the same bits.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.cli.main import main
from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
from tests.helpers.training import make_trainer

DATA = Path(__file__).parent / "data" / "format_1"
STOP, END = 2, 4
FREQS = torch.tensor([1 + 2j, 0.5 - 1j], dtype=torch.complex128)


class Small(pl.LightningModule):
    """Two units side by side, a buffer, and a tensor that no safetensors file can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        with torch.no_grad():
            for number, param in enumerate(self.parameters()):
                param.copy_(((torch.arange(param.numel()) + number) / 8 - 1).view(param.shape))

    def training_step(self, batch: Tensor) -> Tensor:
        self.seen += 1
        return (self.a(batch) + self.b(2 * batch)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2**-6, betas=(0.75, 0.875), weight_decay=2**-4)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["freqs"] = FREQS

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert torch.equal(checkpoint["state_dict"].pop("freqs"), FREQS)


def run(directory: Path, *, steps: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, Small]:
    batches = [torch.arange(8.0).view(2, 4) / 4 - step / 2 for step in range(END)]
    module = Small()
    strategy = SSDOffloadStrategy(nvme_path=directory, host_memory="64MiB", min_unit_numel=0, checkpoint="links")
    trainer = make_trainer(directory, strategy, max_steps=steps, precision="bf16-true", enable_checkpointing=False)
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer, module


def values_of(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by name and kind."""
    with CheckpointReader(checkpoint) as reader:
        found = {
            f"{name}:{kind}": reader.tensor(name, kind)
            for name in reader.parameter_names
            for kind in reader.kinds(name)
        }
        buffers = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in reader.buffers().items()}
        return {name: tensor.clone() for name, tensor in (found | buffers).items()}


def write(directory: Path) -> None:
    """Make the data of this test anew, as whatever format is the present one."""
    trainer, _ = run(directory, steps=STOP)
    trainer.save_checkpoint(directory / "last.ckpt")
    trainer, _ = run(directory, steps=END)
    trainer.save_checkpoint(directory / "after.ckpt")
    save_file(values_of(directory / "after.ckpt"), directory / "after.safetensors")
    shutil.rmtree(directory / "after.ckpt")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_it_verifies_and_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(DATA / "last.ckpt")]) == 0
    assert "no damage found" in capsys.readouterr().out
    assert main(["inspect", "--parameters", str(DATA / "last.ckpt")]) == 0
    shown = capsys.readouterr().out
    assert f"step        {STOP}\n" in shown
    assert "param:BF16 master:F32 exp_avg:F32 exp_avg_sq:F32" in shown


def test_training_goes_on_from_it(tmp_store: Path) -> None:
    trainer, module = run(tmp_store, steps=END, ckpt_path=DATA / "last.ckpt")
    trainer.save_checkpoint(tmp_store / "after.ckpt")
    assert_equal(values_of(tmp_store / "after.ckpt"), load_file(DATA / "after.safetensors"))
    assert module.seen == END


@pytest.mark.parametrize("command", ["copy", "import", "export"])
def test_it_can_be_copied_imported_and_exported(tmp_store: Path, command: str) -> None:
    target = tmp_store / ("new.pt" if command == "export" else "new")
    assert main([command, str(DATA / "last.ckpt"), str(target)]) == 0
    if command == "export":
        state = torch.load(target, weights_only=True)
        assert torch.equal(state["state_dict"]["freqs"], FREQS)
        assert state["optimizer_states"][0]["state"][0]["step"] == STOP
    else:
        assert_equal(values_of(target), values_of(DATA / "last.ckpt"))
    trainer, _ = run(tmp_store, steps=END, ckpt_path=target)
    trainer.save_checkpoint(tmp_store / "after.ckpt")
    after = load_file(DATA / "after.safetensors")
    if command == "export":  # which holds the parameters as they were rounded, without masters
        assert values_of(tmp_store / "after.ckpt").keys() == after.keys()
    else:
        assert_equal(values_of(tmp_store / "after.ckpt"), after)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
