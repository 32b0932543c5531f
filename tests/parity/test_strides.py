"""Parameters keep their strides ([Note: strides]): in memory, in files, in checkpoints of every form, after the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.cli.main import main
from tests.helpers.training import Images, Module, adamw, assert_equal, make_trainer, streamed, train


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm, self.narrow = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), None
        self.narrow = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.norm(self.conv(x)).relu())


class Net(nn.Module):
    """A convolutional network in channels_last, whose last weight is a transposed one, and one is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*[Residual(12) for _ in range(3)])
        self.to(memory_format=torch.channels_last)
        self.head = nn.Parameter(torch.randn(10, 12).mul(0.3).t())
        self.odd = nn.Parameter(torch.randn(8, 1, 8, 12).permute(1, 3, 0, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x.contiguous(memory_format=torch.channels_last)) * self.odd
        return self.blocks(y).mean((2, 3)) @ self.head


class Seen(pl.Callback):
    """Strides of parameters, gradients and states in the run, and norms, whose bits depend on them."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        for param in module.parameters():
            assert param.grad is not None
            self.seen.append((param.stride(), param.is_contiguous(), param.grad.stride(), param.grad.norm().item()))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for param in module.parameters():
            state = trainer.optimizers[0].state[param]
            self.seen.append({k: v.stride() for k, v in state.items() if not k.endswith("_var")})  # other shapes


def adagrad(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(module.parameters(), lr=0.05)


def adafactor(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(module.parameters(), lr=0.05)  # not elementwise


@pytest.mark.parametrize(
    ("optimizer", "settings", "trainer"),
    [
        (adamw, {}, {}),
        (adamw, {"activations": "keep"}, {"gradient_clip_val": 0.5}),
        (adamw, {"host_memory": "auto"}, {"accumulate_grad_batches": 2}),
        (adamw, {"update": "native"}, {}),
        (adamw, {}, {"precision": "bf16-true"}),
        (adafactor, {}, {}),
        (adagrad, {"host_memory": "auto"}, {"precision": "bf16-mixed"}),
    ],
)
def test_training_is_as_in_plain_lightning(tmp_path: Path, optimizer: Any, settings: Any, trainer: Any) -> None:
    """To the bit, but for the update of ours."""
    found = []
    for strategy in ("auto", streamed(**settings)):
        seen = Seen()
        options = {"max_steps": 4, "callbacks": [seen], "data": Images(16), "optimizer": optimizer, "schedule": False}
        found.append((train(tmp_path, Net, strategy, **options, **trainer), seen.seen))
    (plain, expected), (ours, actual) = found
    if settings.get("update") == "native":
        assert [each[:3] for each in actual[:-1] if isinstance(each, tuple)] == [
            each[:3] for each in expected[:-1] if isinstance(each, tuple)
        ]
        torch.testing.assert_close(ours.losses, plain.losses)
    elif "precision" not in trainer or trainer["precision"] != "bf16-true":  # there masters differ on purpose
        assert actual == expected
        assert_equal(ours, plain)
    assert [p.stride() for p in ours.module.parameters()] == [p.stride() for p in plain.module.parameters()]


def fit(folder: Path, strategy: Any, steps: int, ckpt_path: Path | None = None) -> Module:
    pl.seed_everything(3, verbose=False)
    module = Module(Net())
    saves = ModelCheckpoint(folder, "x", every_n_train_steps=2, save_top_k=-1)  # x.ckpt, then x-v1.ckpt
    trainer = make_trainer(folder, strategy, max_steps=steps, callbacks=[saves], enable_checkpointing=True)
    trainer.fit(module, DataLoader(Images(8), batch_size=4), ckpt_path=ckpt_path)
    return module


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Module]:
    """A checkpoint after two steps of plain Lightning, and the module after four."""
    folder = tmp_path_factory.mktemp("plain")
    fit(folder, "auto", 2)
    return folder / "x.ckpt", fit(folder, "auto", 4)


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].cpu(), value.cpu()), name
        assert found[name].stride() == value.stride(), name


@pytest.mark.parametrize("form", ["file", "links"])
@pytest.mark.parametrize("memory", ["min", "auto"])
def test_checkpoints_are_those_of_plain_lightning_and_go_on_in_either(
    tmp_path: Path, plain: tuple[Path, Module], form: str, memory: str
) -> None:
    start, end = plain
    fit(tmp_path, streamed(checkpoint=form, host_memory=memory), 2)
    saved, expected = (torch.load(path, weights_only=True) for path in (tmp_path / "x.ckpt", start))
    assert_same(saved["state_dict"], expected["state_dict"])
    for number, state in expected["optimizer_states"][0]["state"].items():
        assert_same(saved["optimizer_states"][0]["state"][number], state)
    for strategy, source in (("auto", tmp_path / "x.ckpt"), (streamed(), tmp_path / "x.ckpt"), (streamed(), start)):
        again = fit(tmp_path, strategy, 4, source)
        assert_same(again.state_dict(), end.state_dict())


@pytest.mark.parametrize("form", ["file", "links"])
def test_masters_in_two_halves_have_strides_too(tmp_path: Path, form: str) -> None:
    """``state="split"`` computes the bits of "fp32", and shows the same tensors."""
    saved = []
    for state in ("fp32", "split"):
        strategy = streamed(update="native", state=state, checkpoint=form)
        options: dict[str, Any] = {"max_steps": 3, "data": Images(12), "schedule": False, "precision": "bf16-true"}
        result = train(tmp_path, Net, strategy, **options)
        result.trainer.save_checkpoint(tmp_path / f"{state}.ckpt")
        saved.append(torch.load(tmp_path / f"{state}.ckpt", map_location="cpu", weights_only=True))
    expected, found = saved
    assert_same(found["state_dict"], expected["state_dict"])
    assert_same(found["ssd_offload_masters"], expected["ssd_offload_masters"])


def test_other_formats_hold_the_tensors_in_the_order_of_their_shapes(
    tmp_path: Path, plain: tuple[Path, Module]
) -> None:
    fit(tmp_path, streamed(checkpoint="links"), 2)
    expected = torch.load(plain[0], map_location="cpu", weights_only=True)["state_dict"]
    assert main(["export", str(tmp_path / "x.ckpt"), str(tmp_path / "y.ckpt")]) == 0
    assert_same(torch.load(tmp_path / "y.ckpt", weights_only=True)["state_dict"], expected)
    assert main(["export", str(tmp_path / "x.ckpt"), str(tmp_path / "folder")]) == 0
    found = load_file(tmp_path / "folder" / "model.safetensors")
    assert all(torch.equal(found[name.removeprefix("net.")], value) for name, value in expected.items())
    assert main(["verify", str(tmp_path / "x.ckpt")]) == 0
    for source in ("x.ckpt", "y.ckpt", "dcp"):
        if source == "dcp":
            assert main(["export", "--format", "dcp", str(tmp_path / "x.ckpt"), str(tmp_path / "dcp")]) == 0
        assert main(["import", str(tmp_path / source), str(tmp_path / f"{source}.again")]) == 0
        again = fit(tmp_path, streamed(), 4, tmp_path / f"{source}.again")
        assert_same(again.state_dict(), plain[1].state_dict())


def test_a_parameter_with_gaps_is_refused_with_the_way_out(tmp_path: Path) -> None:
    class Sliced(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Parameter(torch.randn(12, 20)[:, ::2])

    with pytest.raises(Exception, match=r"'net.head' .*strides \(20, 2\)\) is a part of a larger tensor.*contiguous"):
        train(tmp_path, Sliced, streamed(), data=Images(8))
