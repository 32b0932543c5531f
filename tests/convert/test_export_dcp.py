"""An exported folder is read by ``torch.distributed.checkpoint`` itself, and comes back through import."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_ssd.checkpoint.contents import CheckpointContent
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.cli.main import main
from lightning_ssd.convert.export_dcp import to_dcp
from lightning_ssd.convert.importing import import_checkpoint
from lightning_ssd.errors import CheckpointError
from lightning_ssd.saving.write import write_checkpoint
from tests.checkpoint.support import Training, write_generation
from tests.convert.test_export import AnonymousMemory


def test_torch_reads_it(training: Training, tmp_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.save(tmp_store / "c")
    assert main(["export", str(tmp_store / "c"), str(tmp_store / "dcp"), "--format", "dcp"]) == 0
    assert str(tmp_store / "dcp" / ".metadata") in capsys.readouterr().out
    values = {**training.tensors("a", "master", 1), **training.tensors("b", "master", 1), "buffer": torch.arange(4) + 1}
    values["head.weight"] = values["a.weight"]
    moments = {**training.tensors("a", "exp_avg", 1), **training.tensors("b", "exp_avg", 1)}
    wanted = {
        "model": {name: torch.zeros_like(value) for name, value in values.items()},
        "optimizer_0": {
            "state": {n: {"exp_avg": torch.zeros_like(v), "step": torch.zeros(())} for n, v in moments.items()},
            "param_groups": [{"lr": 0.0, "betas": (0.0, 0.0), "params": ["", ""]}] * 2,
        },
    }
    dcp.load(wanted, checkpoint_id=tmp_store / "dcp")
    assert all(torch.equal(wanted["model"][name], value) for name, value in values.items())  # type: ignore[arg-type]
    state = wanted["optimizer_0"]["state"]
    assert all(torch.equal(state[name]["exp_avg"], value) for name, value in moments.items())
    assert all(state[name]["step"] == 1 for name in moments)
    assert wanted["optimizer_0"]["param_groups"][1]["params"] == ["b.scale", "b.bias"]
    assert torch.load(tmp_store / "dcp" / "meta.pt")["loops"] == {"epoch": 1}
    assert os.stat(tmp_store / "dcp").st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in (tmp_store / "dcp").iterdir()} == {0o600}
    with pytest.raises(CheckpointError, match=r"exists|not replaced"):
        to_dcp(tmp_store / "c", tmp_store / "dcp")
    assert main(["export", str(tmp_store / "c"), str(tmp_store / "x"), "--format", "dcp", "--strip-prefix", "a."]) == 2


def test_it_comes_back(training: Training, tmp_store: Path) -> None:
    training.save(tmp_store / "c")
    to_dcp(tmp_store / "c", tmp_store / "dcp")
    import_checkpoint(tmp_store / "dcp", tmp_store / "d")
    with CheckpointReader(tmp_store / "d") as reader, CheckpointReader(tmp_store / "c") as old:
        reader.verify()
        for name in old.parameter_names:
            assert torch.equal(reader.value(name), old.value(name))
            assert torch.equal(reader.tensor(name, "exp_avg"), old.tensor(name, "exp_avg"))
        assert reader.state()["loops"] == {"epoch": 1}
        assert torch.equal(reader.buffers()["optimizer.0.a.weight.row"], old.buffers()["optimizer.0.a.weight.row"])


def test_no_memory_in_proportion_to_the_model(tmp_store: Path) -> None:
    nbytes = 192 << 20
    tensors = {f"w{i}": torch.full((nbytes // 32,), float(i)) for i in range(8)}
    unit = write_generation(tmp_store / "big", tensors, unit="u", kind="master")
    del tensors
    write_checkpoint(
        tmp_store / "c", CheckpointContent([unit], {}, {}, [], step=1, dtypes={f"w{i}": "BF16" for i in range(4)})
    )
    with AnonymousMemory() as memory:
        to_dcp(tmp_store / "c", tmp_store / "dcp")
    assert memory.growth_nbytes < 48 << 20
