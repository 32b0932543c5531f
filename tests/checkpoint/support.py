"""A live store in miniature: generations written to files, and the training state that goes into a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ssd.checkpoint.checksum import PIECE_NBYTES, checksum
from lightning_ssd.checkpoint.contents import CheckpointContent
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.manifest import OptimizerRecord
from lightning_ssd.checkpoint.unit_file import UnitFile
from lightning_ssd.checkpoint.writer import StreamWriter, lay_out_tensors, new_file, write_tensors
from lightning_ssd.saving.write import SaveReport, write_checkpoint
from lightning_ssd.store.mapped_safetensors import read_header


def write_generation(
    path: Path, tensors: dict[str, Tensor], *, unit: str, kind: str, linkable: bool = True
) -> UnitFile:
    with new_file(str(path)) as fd:
        write_tensors(StreamWriter(fd), lay_out_tensors(tensors), tensors.__getitem__)
    with open(path, "rb") as file:
        header = read_header(file.fileno(), str(path))
    data = path.read_bytes()[header.data_begin :]
    sums = tuple(checksum(data[i : i + PIECE_NBYTES]) for i in range(0, len(data), PIECE_NBYTES))
    return UnitFile(unit, kind, str(path), linkable, tuple(header.entries.values()), sums, header.data_begin)


@dataclass
class Training:
    """A model of two units with Adam, whose every value is a function of the step."""

    store: Path
    files: list[UnitFile] = field(default_factory=list)
    step: int = 0
    # Sizes: several checksum pieces in unit a, odd byte counts in both, an empty and a scalar tensor.
    shapes: dict[str, dict[str, tuple[int, ...]]] = field(
        default_factory=lambda: {"a": {"a.weight": (700, 601), "a.none": (0, 3)}, "b": {"b.scale": (), "b.bias": (5,)}}
    )

    def tensors(self, unit: str, kind: str, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(hash((len(unit), kind == "exp_avg", step)) % 2**31)
        dtype = {"b.bias": torch.bfloat16}
        return {
            name: torch.randn(shape, generator=generator).to(dtype.get(name, torch.float32))
            for name, shape in self.shapes[unit].items()
        }

    def advance(self) -> None:
        self.step += 1
        self.files = [
            write_generation(
                self.store / f"{unit}.{kind}.{self.step}",
                self.tensors(unit, kind, self.step),
                unit=unit,
                kind=kind,
            )
            for unit in self.shapes
            for kind in ("master", "exp_avg")
        ]

    def record(self) -> OptimizerRecord:
        group = {"lr": 1e-3 / self.step, "betas": (0.9, 0.99), "limit": float("inf"), "lr_t": torch.tensor(0.1)}
        names = [name for unit in self.shapes.values() for name in unit]
        return OptimizerRecord(
            "torch.optim.adamw.AdamW",
            [{**group, "params": names[:2]}, {**group, "params": names[2:]}],
            {name: {"step": float(self.step)} for name in names},
            ["exp_avg"],
        )

    def save(self, target: Path, **options: Any) -> SaveReport:
        buffers = {
            "buffer": torch.arange(4) + self.step,
            "optimizer.0.a.weight.row": torch.full((700,), float(self.step)),
        }
        state = {"loops": {"epoch": self.step}, "tensor": torch.ones(3) * self.step}
        aliases = options.pop("aliases", {"head.weight": "a.weight"})
        dtypes = options.pop("dtypes", {"b.bias": "BF16"})
        content = CheckpointContent(self.files, buffers, state, [self.record()], self.step, dtypes, aliases)
        return write_checkpoint(target, content, **options)


def assert_whole(target: Path, training: Training, step: int) -> None:
    """Everything of one step, and nothing of another."""
    with CheckpointReader(target) as reader:
        reader.verify()
        assert reader.manifest.step == step
        for unit in training.shapes:
            for kind in ("master", "exp_avg"):
                for name, expected in training.tensors(unit, kind, step).items():
                    found = reader.tensor(name, kind)
                    assert found.dtype == expected.dtype
                    assert torch.equal(found, expected)
        assert torch.equal(reader.buffers()["buffer"], torch.arange(4) + step)
        assert reader.state()["loops"] == {"epoch": step}
        record = training.record()
        (found_record,) = reader.optimizers()
        assert found_record.state["a.weight"] == {"step": float(step)}
        assert found_record.param_groups[0]["betas"] == record.param_groups[0]["betas"]
        assert found_record.param_groups[0]["limit"] == float("inf")
        assert torch.equal(found_record.param_groups[1]["lr_t"], torch.tensor(0.1))


def links(path: Path) -> Path:
    """The folder beside the small file at ``path``."""
    return path.with_name(path.name + ".links")
