"""Imported checkpoints, end to end: training goes on from them as plain Lightning goes on from the same state."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.cli.main import main
from lightning_ssd.convert.importing import ImportOptions, import_checkpoint
from lightning_ssd.convert.rename import Renaming
from lightning_ssd.errors import CheckpointError
from tests.helpers.models import GPT, Block
from tests.helpers.training import Module, Tokens, adamw, make_trainer, streamed

START = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": pl.__version__, "lr_schedulers": []}


def fit(path: Path, strategy: Any, module: Module, ckpt_path: Path | None, steps: int = 4, **options: Any) -> Module:
    pl.seed_everything(5, verbose=False)
    trainer = make_trainer(path, strategy, max_steps=steps, **options)
    trainer.fit(module, DataLoader(Tokens(64), batch_size=4, shuffle=True), ckpt_path=ckpt_path)
    return module


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(a: Module, b: Module) -> None:
    assert a.losses == b.losses
    assert not [name for name, value in values(a).items() if not torch.equal(value, values(b)[name])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Module, torch.optim.Optimizer]:
    """A plainly trained module and its optimizer: two groups, tied weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("trained")
    module = Module(GPT(tie=True))
    trainer = make_trainer(path, "auto", max_steps=3)
    trainer.fit(module, DataLoader(Tokens(64), batch_size=4))
    return module, trainer.optimizers[0]


@pytest.fixture
def like(tmp_path: Path) -> Path:
    """What the model to be trained says of itself: a checkpoint after one step."""
    pl.seed_everything(9, verbose=False)
    trainer = make_trainer(tmp_path, streamed(), max_steps=1)
    trainer.fit(Module(GPT(tie=True)), DataLoader(Tokens(8), batch_size=4))
    trainer.save_checkpoint(tmp_path / "like.ckpt")
    return tmp_path / "like.ckpt"


def by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Optimizer state as FSDP and ``get_state_dict`` give it."""
    names = {param: name for name, param in module.named_parameters()}
    state = {names[p]: dict(s) for p, s in optimizer.state.items()}
    return {
        "state": state,
        "param_groups": [{**g, "params": [names[p] for p in g["params"]]} for g in optimizer.param_groups],
    }


def plain_start(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> Path:
    """The same state for plain Lightning, at the beginning of its loops and schedules."""
    states = adamw(module).state_dict()
    states["state"] = {} if optimizer is None else optimizer.state_dict()["state"]
    torch.save({**START, "state_dict": module.state_dict(), "optimizer_states": [states]}, path)
    return path


def write_hugging_face(path: Path, module: nn.Module, optimizer: Any) -> Path:
    path.mkdir()
    save_file({n.removeprefix("net."): p.detach() for n, p in module.named_parameters()}, path / "model.safetensors")
    return path


def write_dcp(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    dcp.save({"model": module.state_dict(), "optimizer_0": by_name(module, optimizer)}, checkpoint_id=path)
    return path


def write_universal(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, *, flat: bool = False) -> Path:
    """The folder that DeepSpeed's ``ds_to_universal`` makes, as docs/checkpoints.md describes it."""
    for name, param in module.named_parameters():
        folder = path / "zero" / name
        folder.mkdir(parents=True)
        state = optimizer.state[param]
        for kind, value in (("fp32", param), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
            tensor = value.detach().clone()
            torch.save(tensor.flatten() if flat else {"param": tensor, "cat_dim": 0}, folder / f"{kind}.pt")
        if not flat:
            torch.save(int(state["step"]), folder / "step.pt")
    (path / "zero" / "optimizer_state.pt").write_bytes(b"a pickle of DeepSpeed's own classes")
    return path


def write_flat(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    return write_universal(path, module, optimizer, flat=True)


@pytest.mark.parametrize(
    ("write", "options", "has_state"),
    [
        (write_hugging_face, ["--like"], False),
        (write_dcp, [], True),
        (write_dcp, ["--like"], True),
        (write_universal, ["--like"], True),
        (write_flat, ["--like", "--step", "3"], True),
    ],
    ids=["hugging face", "dcp", "dcp like", "universal", "universal flat"],
)
def test_fit_goes_on_from_an_import(
    tmp_path: Path, trained: Any, like: Path, write: Callable[..., Path], options: list[str], has_state: bool
) -> None:
    module, optimizer = trained
    source = write(tmp_path / "source", module, optimizer)
    arguments = [o if o != "--like" else f"--like={like}" for o in options]
    assert main(["import", str(source), str(tmp_path / "target.ckpt"), *arguments]) == 0
    assert main(["verify", str(tmp_path / "target.ckpt")]) == 0
    plain = fit(
        tmp_path,
        "auto",
        Module(GPT(tie=True)),
        plain_start(tmp_path / "p.ckpt", module, optimizer if has_state else None),
    )
    ours = fit(tmp_path, streamed(), Module(GPT(tie=True)), tmp_path / "target.ckpt")
    assert_same(plain, ours)


@pytest.mark.parametrize("use_like", [False, True])
def test_a_plain_checkpoint_goes_on_where_it_was(tmp_path: Path, like: Path, use_like: bool) -> None:
    trainer = make_trainer(tmp_path, "auto", max_steps=5)
    pl.seed_everything(1, verbose=False)
    trainer.fit(Module(GPT(tie=True)), DataLoader(Tokens(64), batch_size=4))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    report = import_checkpoint(
        tmp_path / "plain.ckpt", tmp_path / "target.ckpt", ImportOptions(like=str(like) if use_like else None)
    )
    assert (report.step, report.optimizers, report.missing, report.left_over) == (5, "imported", [], [])
    with CheckpointReader(tmp_path / "target.ckpt") as reader:
        assert reader.manifest.aliases == {"net.head.weight": "net.tok.weight"}
    assert_same(
        fit(tmp_path, "auto", Module(GPT(tie=True)), tmp_path / "plain.ckpt", steps=12),
        fit(tmp_path, streamed(), Module(GPT(tie=True)), tmp_path / "target.ckpt", steps=12),
    )


def test_weights_alone(tmp_path: Path, trained: Any) -> None:
    """They can be validated and tested; a fit needs to know the optimizer's groups."""
    module, optimizer = trained
    source = write_hugging_face(tmp_path / "hf", module, optimizer)
    (tmp_path / "map.json").write_text(json.dumps({"*": "net.*"}))
    assert main(["import", str(source), str(tmp_path / "target"), "--map", str(tmp_path / "map.json")]) == 0

    class NotStrict(Module):
        strict_loading = False  # the folder has the head's weight under one of its two names

    other = NotStrict(GPT(tie=True))
    loader = DataLoader(Tokens(8), batch_size=4)
    make_trainer(tmp_path, streamed()).validate(other, loader, ckpt_path=tmp_path / "target", verbose=False)
    assert not [name for name, value in values(module).items() if not torch.equal(value, values(other)[name])]
    with pytest.raises(KeyError, match="only the model"):
        fit(tmp_path, streamed(), NotStrict(GPT(tie=True)), tmp_path / "target")


# ------------------------------------------------------------------------------------------------ renamed and added


class Renamed(GPT):
    """`GPT` with other names; ``extra`` adds a parameter to the middle of the optimizer's groups."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__(tie=True)
        renamed = {"layers" if name == "blocks" else name: module for name, module in self._modules.items()}
        self._modules.clear()
        self._modules.update(renamed)
        if extra:
            self.layers[1] = Scaled()

    def forward(self, ids: Tensor) -> Tensor:
        self.__dict__["blocks"] = self._modules["layers"]
        return super().forward(ids)


class Scaled(Block):
    def __init__(self) -> None:
        super().__init__(32, 4)
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(x * self.scale, **kwargs)


def test_renamed_parameters_are_links_under_new_names(tmp_path: Path) -> None:
    pl.seed_everything(1, verbose=False)
    trainer = make_trainer(tmp_path, streamed(), max_steps=5)
    trainer.fit(Module(GPT(tie=True)), DataLoader(Tokens(64), batch_size=4, shuffle=True))
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    (tmp_path / "map.json").write_text(json.dumps({"net.blocks.*": "net.layers.*"}))
    assert (
        main(["import", str(tmp_path / "old.ckpt"), str(tmp_path / "new.ckpt"), f"--map={tmp_path / 'map.json'}"]) == 0
    )
    for file in (tmp_path / "new.ckpt.links" / "units").iterdir():
        assert file.stat().st_nlink >= 2
    with CheckpointReader(tmp_path / "new.ckpt") as reader:
        assert not [name for name in reader.parameter_names if "blocks" in name]
        assert [name for name in reader.parameter_names if "layers.1" in name]
        reader.verify()
    old = fit(tmp_path, streamed(), Module(GPT(tie=True)), tmp_path / "old.ckpt", steps=12)
    new = fit(tmp_path, streamed(), Module(Renamed()), tmp_path / "new.ckpt", steps=12)
    assert old.losses == new.losses


def test_an_added_parameter_comes_from_the_models_own_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pl.seed_everything(1, verbose=False)
    trainer = make_trainer(tmp_path, streamed(), max_steps=5)
    trainer.fit(Module(GPT(tie=True)), DataLoader(Tokens(64), batch_size=4, shuffle=True))
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    model = make_trainer(tmp_path, streamed(), max_steps=1)
    model.fit(Module(Renamed(extra=True)), DataLoader(Tokens(8), batch_size=4))
    model.save_checkpoint(tmp_path / "model.ckpt")
    (tmp_path / "map.json").write_text(json.dumps({"net.blocks.*": "net.layers.*"}))
    command = ["import", str(tmp_path / "old.ckpt"), str(tmp_path / "new.ckpt")]
    command += [f"--map={tmp_path / 'map.json'}", f"--like={tmp_path / 'model.ckpt'}"]
    assert main(command) == 1
    assert "'net.layers.1.scale' is missing there" in capsys.readouterr().err
    assert main([*command, "--partial", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == ["net.layers.1.scale"]
    assert report["renamed"]["net.blocks.1.up.weight"] == "net.layers.1.up.weight"
    assert not os.path.exists(tmp_path / "new.ckpt")
    assert main([*command, "--partial"]) == 0
    with CheckpointReader(tmp_path / "new.ckpt") as new, CheckpointReader(tmp_path / "old.ckpt") as old:
        (record,) = new.optimizers()
        assert "net.layers.1.scale" not in record.state
        assert any("net.layers.1.scale" in group["params"] for group in record.param_groups)
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(new.tensor("net.layers.1.up.bias", kind), old.tensor("net.blocks.1.up.bias", kind))
    module = fit(tmp_path, streamed(), Module(Renamed(extra=True)), tmp_path / "new.ckpt", steps=8)
    assert len(module.losses) == 3
    assert module.trainer.global_step == 8


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, trained: Any, like: Path) -> None:
    module, optimizer = trained
    universal = write_universal(tmp_path / "universal", module, optimizer)
    flat = write_flat(tmp_path / "flat", module, optimizer)
    target = tmp_path / "target"
    for source, options, message in [
        (universal, ImportOptions(), "which parameters were in which group.*--like"),
        (flat, ImportOptions(weights_only=True), "stored flat.*--like"),
        (flat, ImportOptions(like=str(like)), "number of steps.*--step"),
        (universal, ImportOptions(like=str(like), renaming=Renaming({"net.tok.weight": "tok"})), "'tok'.*--map"),
        (universal, ImportOptions(renaming=Renaming({"nte.*": "net.*"})), r"no tensor is called 'nte\.\*'"),
        (universal, ImportOptions(renaming=Renaming({"net.tok.weight": "net.pos"})), "both.*'net.pos'"),
        (tmp_path / "nothing", ImportOptions(), "is no file"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(source, target, options)
        assert not target.exists()
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(CheckpointError, match="exists"):
        import_checkpoint(universal, target, ImportOptions(weights_only=True))


def test_an_optimizer_that_counts_no_steps_is_not_asked_for_them(tmp_path: Path) -> None:
    """Lion has one moment and no step."""
    module = nn.Linear(3, 2)
    state = {i: {"exp_avg": torch.randn_like(param)} for i, param in enumerate(module.parameters())}
    states = {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    torch.save({**START, "state_dict": module.state_dict(), "optimizer_states": [states]}, tmp_path / "plain.ckpt")
    import_checkpoint(tmp_path / "plain.ckpt", tmp_path / "target", ImportOptions())
    with CheckpointReader(tmp_path / "target") as reader:
        (record,) = reader.optimizers()
        assert record.kinds == ["exp_avg"]
        assert not any("step" in found for found in record.state.values())
        assert torch.equal(reader.tensor("weight", "exp_avg"), state[0]["exp_avg"])
