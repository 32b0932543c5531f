"""Training under the strategy equals plain Lightning to the bit.

Everything streams: every module is a unit of its own, the memory plan is the smallest, and every buffer is filled
with NaN bytes when it is returned, so that a late use would not go unnoticed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ssd.kernels import api as kernels
from lightning_ssd.optim.rules import NATIVE_RULES, SGDRule
from lightning_ssd.session import runtime
from lightning_ssd.session.handover import masters_of
from lightning_ssd.step.gradients import GradientStore
from lightning_ssd.strategy.for_lightning import SSDOffloadPrecision
from tests.helpers import optimizers as tested_settings
from tests.helpers.models import GPT, ConvNet, FunctionalTie, ViT
from tests.helpers.training import Images, Tokens, adamw, assert_equal, streamed, train


def frozen_gpt() -> nn.Module:
    net = GPT(tie=True)
    for module in (net.blocks[0], net.blocks[2].up):
        module.requires_grad_(False)
    return net


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "gpt": (GPT, lambda: Tokens(400)),
    "tied": (lambda: GPT(tie=True), lambda: Tokens(400)),
    "functional tie": (FunctionalTie, lambda: Tokens(400)),
    "frozen": (frozen_gpt, lambda: Tokens(400)),
    "dropout": (lambda: GPT(dropout=0.2), lambda: Tokens(400)),
    "vit": (ViT, lambda: Images(400)),
    "conv": (ConvNet, lambda: Images(400)),
    "conv in place": (lambda: ConvNet(inplace=True), lambda: Images(400)),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip by norm": {"gradient_clip_val": 0.5},
    "clip by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 3},
    "accumulate and clip": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("overlap", ["auto", "off"])
def test_fifty_steps_are_equal(tmp_path: Path, model: str, overlap: str) -> None:
    make_net, data = MODELS[model]
    plain = train(tmp_path, make_net, data=data(), max_steps=50)
    ours = train(tmp_path, make_net, streamed(overlap=overlap), data=data(), max_steps=50)
    assert_equal(plain, ours)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_options_and_mixed_precision_are_equal(tmp_path: Path, options: str, precision: str) -> None:
    make_net = functools.partial(GPT, tie=True)
    kwargs = OPTIONS[options] | {"precision": precision, "max_steps": 20}
    plain = train(tmp_path, make_net, **kwargs)
    assert_equal(plain, train(tmp_path, make_net, streamed(), **kwargs))


@pytest.mark.parametrize("min_unit_numel", [0, 1_000_000])
@pytest.mark.parametrize("host_memory", ["min", "256MiB"])
@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_budget_cut_and_activations_do_not_matter(
    tmp_path: Path, min_unit_numel: int, host_memory: str, activations: str
) -> None:
    make_net = functools.partial(GPT, tie=True, dropout=0.1)
    plain = train(tmp_path, make_net, max_steps=10, gradient_clip_val=0.5)
    strategy = streamed(min_unit_numel=min_unit_numel, host_memory=host_memory, activations=activations)
    assert_equal(plain, train(tmp_path, make_net, strategy, max_steps=10, gradient_clip_val=0.5))


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
        functools.partial(torch.optim.Adam, lr=1e-3, weight_decay=0.01, amsgrad=True),
        functools.partial(torch.optim.Adagrad, lr=1e-2),
        functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
        functools.partial(torch.optim.Adafactor, lr=1e-2),
        functools.partial(torch.optim.NAdam, lr=1e-3),
    ],
    ids=lambda make: make.func.__name__,
)
def test_any_optimizer_runs_as_its_own_class(tmp_path: Path, make: Callable[..., torch.optim.Optimizer]) -> None:
    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        return make(module.parameters())

    plain = train(tmp_path, GPT, optimizer=optimizer)
    assert_equal(plain, train(tmp_path, GPT, streamed(), optimizer=optimizer))


@pytest.mark.parametrize("cls", NATIVE_RULES)
def test_a_rule_trains_as_its_class_does(tmp_path: Path, cls: type[torch.optim.Optimizer]) -> None:
    """With the last settings in the table: the bits of the class, where this machine can have them."""

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        made = cls(module.parameters(), **tested_settings.OPTIONS[cls][-1])
        made.param_groups[0].update({key: False for key in ("foreach",) if key in made.defaults})
        return made

    plain = train(tmp_path, GPT, optimizer=optimizer)
    ours = train(tmp_path, GPT, streamed(update="native"), optimizer=optimizer)
    if kernels.is_bit_equal_to_torch():
        assert_equal(plain, ours)
    else:
        torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(plain.losses), rtol=1e-3, atol=1e-4)


def test_the_first_lines_say_which_rules_have_a_kernel(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithoutKernel(SGDRule):
        has_kernel = False

    monkeypatch.setitem(NATIVE_RULES, torch.optim.SGD, WithoutKernel)
    with caplog.at_level("INFO"):
        for cls in (torch.optim.AdamW, torch.optim.SGD):
            train(
                tmp_path, GPT, streamed(update="native"), optimizer=lambda m, cls=cls: cls(m.parameters()), max_steps=1
            )
    adamw_line, sgd_line = (line for line in caplog.text.splitlines() if line.startswith("  update: "))
    assert f"AdamW by {kernels.describe()}" in adamw_line
    assert "SGD by WithoutKernel, piece by piece" in sgd_line


def test_overlap_on_and_off_are_equal_with_native_kernels(tmp_path: Path) -> None:
    runs = [train(tmp_path, GPT, streamed(update="native", overlap=o), max_steps=20) for o in ("auto", "off")]
    assert_equal(*runs)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_native_kernels_stay_as_close_to_plain_as_torchs_fused(tmp_path: Path, precision: str) -> None:
    def fused(module: nn.Module) -> torch.optim.Optimizer:
        optimizer = adamw(module)
        for group in optimizer.param_groups:
            group["fused"] = True
        return optimizer

    def distance(a: Any, b: Any) -> float:
        return max(float((a.weights[n].double() - b.weights[n].double()).abs().max()) for n in a.weights)

    plain = train(tmp_path, GPT, max_steps=50, precision=precision)
    reference = distance(plain, train(tmp_path, GPT, optimizer=fused, max_steps=50, precision=precision))
    ours = distance(plain, train(tmp_path, GPT, streamed(update="native"), max_steps=50, precision=precision))
    assert ours <= reference


def test_validation_and_predict_use_the_current_weights(tmp_path: Path) -> None:
    plain = train(tmp_path, GPT, validate=True, val_check_interval=3, max_steps=9, limit_val_batches=3)
    ours = train(tmp_path, GPT, streamed(), validate=True, val_check_interval=3, max_steps=9, limit_val_batches=3)
    assert plain.val_losses == ours.val_losses
    assert_equal(plain, ours)
    loader = torch.utils.data.DataLoader(Tokens(8), batch_size=4)
    predictions = [result.trainer.predict(result.module, loader) for result in (plain, ours)]
    assert all(torch.equal(a, b) for a, b in zip(*predictions, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_taken_off_the_device_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    """The way gradients go on a GPU, here with the CPU as the other device."""
    monkeypatch.setattr(runtime, "GradientStore", lambda scratch, **_: GradientStore(scratch, off_device=True))
    make_net = functools.partial(GPT, tie=True)
    plain = train(tmp_path, make_net, **OPTIONS[options])
    assert_equal(plain, train(tmp_path, make_net, streamed(), **OPTIONS[options]))


def test_a_master_is_rounded_to_its_parameter_in_every_step(tmp_path: Path) -> None:
    """bf16-true with float32 masters: what compute reads is the master, rounded to nearest even."""
    ours = train(tmp_path, frozen_gpt, streamed(update="native"), max_steps=5, precision="bf16-true")
    torch_rule = train(tmp_path, frozen_gpt, streamed(update="torch"), max_steps=5, precision="bf16-true")
    masters = masters_of(ours.trainer.strategy.session)
    trained = {name: p for name, p in ours.module.named_parameters() if p in masters}
    assert trained
    for name, param in trained.items():
        assert torch.equal(masters[param].bfloat16(), ours.weights[name]), name
        assert masters[param].dtype == torch.float32
    assert_equal(ours, torch_rule)


def test_without_a_master_sixteen_bit_training_is_plain_lightnings(tmp_path: Path) -> None:
    plugin = SSDOffloadPrecision("bf16-true", master_dtype="param")
    plain = train(tmp_path, GPT, max_steps=10, precision="bf16-true")
    assert_equal(plain, train(tmp_path, GPT, streamed(update="auto"), max_steps=10, plugins=[plugin]))
    option = streamed(update="auto", master="param")
    assert_equal(plain, train(tmp_path, GPT, option, max_steps=10, precision="bf16-true"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_that_came_in_sixteen_bits_is_trained_as_plain_lightning_does(tmp_path: Path, precision: Any) -> None:
    def sixteen_bits() -> nn.Module:
        return GPT().bfloat16()

    plain = train(tmp_path, sixteen_bits, max_steps=5, precision=precision)
    for update in ("auto", "torch"):
        assert_equal(plain, train(tmp_path, sixteen_bits, streamed(update=update), max_steps=5, precision=precision))
    with_masters = train(tmp_path, sixteen_bits, streamed(master="fp32"), max_steps=5, precision=precision)
    masters = masters_of(with_masters.trainer.strategy.session)
    for name, param in with_masters.module.named_parameters():
        assert masters[param].dtype == torch.float32
        assert torch.equal(masters[param].bfloat16(), with_masters.weights[name])
