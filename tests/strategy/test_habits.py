"""Habits of projects beyond the surface of the Trainer: models, steps, optimizers and data of many kinds.

They are compared as the patterns of `test_compatibility.py`, and are rows of the same page.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as cb

from tests.helpers import compatibility_habits as habits
from tests.helpers import compatibility_steps as steps
from tests.helpers.compatibility import Pattern, compare
from tests.helpers.compatibility_modules import Freezes, Net

MODELS = {
    "parametrizations: weight_norm, spectral_norm, orthogonal": habits.Parametrized,
    "nn.utils.weight_norm and spectral_norm": habits.NormHooks,
    "tied weights, aliases of modules, a weight used transposed": habits.Tied,
    "nn.Embedding(max_norm), nn.EmbeddingBag": habits.Embeds,
    "LSTM and GRU cells, packed sequences": habits.Recurrent,
    "nn.TransformerEncoder with padding, nn.MultiheadAttention": habits.Attends,
    "channels_last": habits.Convolves,
    "a lazy module and a head made in setup()": habits.MadeInSetup,
    "quantisation-aware training (torch.ao)": habits.FakeQuantized,
    "torch.fx.GraphModule": habits.Traced,
    "torch.utils.checkpoint": habits.Checkpoints,
    "blocks that keep state, return objects, work in place, are skipped": habits.OddBlocks,
    "a LightningModule inside, nn.DataParallel, unused parameters": habits.Nested,
    "a frozen backbone, teachers outside of the module tree": habits.Frozen,
    "parameters in lists and dictionaries, scalar, empty, complex, integer": habits.Params,
    "parts in float64 and bfloat16": habits.Dtypes,
    "weights used without their modules: F.*, functional_call, autograd.Function": habits.Direct,
    "buffers, get_extra_state, torchmetrics": habits.Buffers,
    "a loss with parameters, penalties over all weights, a skipped batch": habits.LossWithWeights,
}
STEPS = {
    "toggle_optimizer, accumulation, clip_gradients by hand": habits.TogglesAndAccumulates,
    "weights moved and moved back within a step, gradients assigned": habits.TakesTurns,
    "gradients of second order; gradients in validation": steps.SecondOrder,
    "hooks on parameters, gradients and modules": steps.Hooked,
    "gradients changed, clipped and logged in hooks": steps.ChangesGrads,
    "gradients read after the step": steps.ReadsGradsLate,
    "optimizer_step with a warm-up": steps.WarmsUp,
    "optimizer_step that runs the closure first, and skips updates": steps.ClosureFirst,
    "weights as a vector and back, load_state_dict, nn.init in the run": steps.Restores,
    "averages by hand and by torch.optim.swa_utils, .data swapped for validation": steps.Averages,
    "requires_grad and eval() that change in the run": steps.Thaws,
    "forwards between batches; questions to parameters, Trainer, optimizer": steps.LooksInside,
    "other models trained beside": steps.HasOthers,
    "should_stop": steps.Stops,
    "autocast in forward": steps.CastsItself,
    "IterableDataset": steps.Streams,
    "workers of a loader": steps.Workers,
    "CombinedLoader, transfer_batch_to_device": steps.Combines,
}
OPTIMIZERS: dict[str, Any] = {
    "RMSprop": lambda params: torch.optim.RMSprop(params, 0.01, momentum=0.9, centered=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, 0.05),
    "Adadelta": lambda params: torch.optim.Adadelta(params, 0.5),
    "Adamax": lambda params: torch.optim.Adamax(params, 0.01),
    "NAdam": lambda params: torch.optim.NAdam(params, 0.01),
    "RAdam": lambda params: torch.optim.RAdam(params, 0.01),
    "Rprop": lambda params: torch.optim.Rprop(params, 0.01),
    "ASGD": lambda params: torch.optim.ASGD(params, 0.01),
    "Adafactor": lambda params: torch.optim.Adafactor(params, 0.05),
    "Adam(amsgrad, maximize)": lambda params: torch.optim.Adam(params, 0.01, amsgrad=True, maximize=True),
    "AdamW(fused)": lambda params: torch.optim.AdamW(params, 0.01, fused=True),
    "AdamW(foreach)": lambda params: torch.optim.AdamW(params, 0.01, foreach=True),
    "AdamW, lr a tensor": lambda params: torch.optim.AdamW(params, torch.tensor(0.01)),
}


class Thawed(cb.BaseFinetuning):
    def freeze_before_training(self, module: pl.LightningModule) -> None:
        self.freeze(module.first)

    def finetune_function(self, module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.first, optimizer, 0.01)


def epochs(number: int, **more: Any) -> Any:
    return lambda: {"max_epochs": number, "max_steps": -1, **more}


def saver(**options: Any) -> Any:
    return lambda: [cb.ModelCheckpoint("saved", **options)]


SAVES: Any = lambda: {"enable_checkpointing": True}  # noqa: E731
OTHERS = [
    Pattern("Optimizers", "one group a parameter, SequentialLR", steps.Groups),
    Pattern("Optimizers", "SGD with nesterov, LambdaLR", steps.Lambda),
    Pattern("Optimizers", "made in __init__, with names", steps.MakesOptimizerItself),
    Pattern("Optimizers", "none", steps.NoOptimizer),
    Pattern("Optimizers", "state read, changed and cleared in the run", steps.ChangesState),
    Pattern("Optimizers", "a group added in the run", steps.ChangesGroups, resumes=False),
    Pattern("LightningModule", "more epochs and a new head in the run", steps.Grows, epochs(1), resumes=False),
    Pattern("LightningModule", "strict_loading=False, frozen weights left out", steps.NotStrict),
    Pattern("Callbacks", "one whose state has tensors", callbacks=lambda: [steps.HasTensors()]),
    Pattern("Callbacks", "BaseFinetuning", Freezes, epochs(2), lambda: [Thawed()], resumes=False),
    Pattern("Callbacks", "WeightAveraging", callbacks=lambda: [cb.WeightAveraging(avg_fn=lambda a, b, n: (a + b) / 2)]),
    Pattern("Callbacks", "ThroughputMonitor", callbacks=lambda: [cb.ThroughputMonitor(len)], same_logs=False),
    Pattern("Callbacks", "ModelCheckpoint(save_last)", Net, SAVES, saver(save_last=True, monitor="val", mode="max")),
    Pattern(
        "Callbacks", "ModelCheckpoint(save_last='link')", Net, SAVES, saver(save_last="link", every_n_train_steps=2)
    ),
    Pattern("Callbacks", "ModelCheckpoint(save_weights_only)", Net, SAVES, saver(save_weights_only=True)),
    Pattern(
        "Callbacks",
        "ModelCheckpoint(save_on_train_epoch_end), a metric in the name",
        Net,
        epochs(2, enable_checkpointing=True),
        saver(save_on_train_epoch_end=True, monitor="loss_epoch", filename="{epoch}-{loss_epoch:.3f}"),
    ),
    Pattern("Trainer", "accumulate_grad_batches=4", Net, epochs(2, accumulate_grad_batches=4)),
    Pattern(
        "Trainer",
        "gradient_clip_val with accumulation",
        Net,
        epochs(1, accumulate_grad_batches=2, gradient_clip_val=0.1),
    ),
    Pattern("Trainer", "max_steps=0", Net, lambda: {"max_steps": 0}, same_checkpoint=False),
    Pattern("Trainer", "limit_train_batches=1", Net, epochs(3, limit_train_batches=1)),
    Pattern("Trainer", "num_sanity_val_steps=-1", Net, lambda: {"num_sanity_val_steps": -1}),
    Pattern("Trainer", "logger=True", Net, lambda: {"logger": True, "enable_checkpointing": True}),
]
PATTERNS = {
    f"{each.area}: {each.what}": each
    for each in (
        *(Pattern("Models", what, module) for what, module in MODELS.items()),
        *(Pattern("LightningModule", what, module) for what, module in STEPS.items()),
        *(Pattern("Optimizers", what, steps.optimized_by(optimizer)) for what, optimizer in OPTIMIZERS.items()),
        *OTHERS,
    )
}


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.not_simulated(reason="the smallest models; tests/parity has the device")
@pytest.mark.parametrize("name", PATTERNS)
def test_is_as_in_plain_lightning(tmp_path: Path, name: str) -> None:
    compare(tmp_path, PATTERNS[name])
