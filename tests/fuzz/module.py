"""The LightningModule and the callback of a program."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from tests.fuzz.features import BEFORE, BETWEEN, CALLBACKS, LOSSES
from tests.fuzz.model import VOCAB, Net, real
from tests.fuzz.optimizers import OPTIMIZERS, groups, with_schedule
from tests.fuzz.program import Program
from tests.fuzz.teachers import Following

Batch = tuple[Tensor, Tensor]


class Fuzzed(pl.LightningModule):
    """Trains as its program says.

    Attributes:
        seen: What was noted, in order: a word and a value.
        has_begun: A step was begun.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.seen: list[tuple[str, Any]] = []
        self.has_begun = False
        self.automatic_optimization = program.manual == "none"
        self.net = Net(program)
        self.bank: Tensor | None = None
        self.anchors: list[Tensor] = []
        if "prune" in program.features:
            prune.l1_unstructured(self.net.head, "weight", 0.3)
        if program.own:
            self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(VOCAB))
        if "frozen_critic" in program.features:
            self.critic = copy.deepcopy(self.net).requires_grad_(False)
        if program.teacher != "none":
            self._make_teacher()
        if "hook_on_blocks" in program.features:
            for block in self.net.each_block():
                block.register_forward_hook(_louder)

    def _make_teacher(self) -> None:
        student: nn.Module = self.net if self.program.teacher_of == "net" else self.net.each_block()[-1]
        if self.program.teacher == "averaged_model":
            self.teacher: nn.Module = AveragedModel(student, avg_fn=get_ema_avg_fn(0.9)).requires_grad_(False)
        else:
            self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.follow = Following(self.program.teacher, self.teacher, student)

    def note(self, word: str, value: Any) -> None:
        """Remember a value; it is compared with the other run's."""
        self.seen.append((word, value.detach().clone() if isinstance(value, Tensor) else value))

    def forget(self) -> None:
        """Hold no graph: one holds the run whose parameters it saved, in a circle that no collector sees."""
        self.loss = self.logits = self.bank = None

    def follow_at(self, when: str) -> None:
        if self.program.teacher != "none" and self.program.teacher_when == when:
            self.follow.update()

    # -- the step ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.has_begun = True
        if "skip_step" in self.program.features and batch_idx % 3 == 1:
            return None
        self.follow_at("step_start")
        for name in self.program.features:
            if name in BEFORE:
                BEFORE[name](self, batch[0])
        if not self.automatic_optimization:
            return self._manual_step(batch, batch_idx)
        loss = self._whole_loss(batch)
        self.follow_at("step_end")
        return loss

    def _whole_loss(self, batch: Batch) -> Tensor:
        self.loss = loss = self._loss(batch)
        for name in (*self.program.features, self.program.setup):
            if name in LOSSES:
                loss = loss + LOSSES[name](self, batch[0])
        if self.program.teacher != "none":
            loss = loss + self._distillation(batch[0])
        self.note("loss", loss)
        self.log("loss", loss)
        if "log_weights" in self.program.features:
            self.log("head", self.net.head.weight.detach().float().norm(), on_epoch=True)
        for name in self.program.features:
            if name in BETWEEN:
                BETWEEN[name](self, batch[0])
        return loss

    def _loss(self, batch: Batch) -> Tensor:
        logits, extra = self.net(batch[0])
        if self.program.own:
            logits = logits * self.scale + self.shift
        self.logits = logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten()) + extra

    @torch.no_grad()
    def _distillation(self, ids: Tensor) -> Tensor:
        if self.program.teacher_of == "net":
            target = self.teacher(ids)[0].float()
            with torch.enable_grad():
                return F.mse_loss(self.logits.float(), target) * 0.1
        self.note("teacher", torch.stack([param.float().sum() for param in real(self.teacher)]))
        return torch.zeros(())

    def _manual_step(self, batch: Batch, batch_idx: int) -> Any:
        way = self.program.manual
        optimizers = self.optimizers(use_pl_optimizer=True)
        every = optimizers if isinstance(optimizers, list) else [optimizers]
        first = every[0]
        if way == "closure":
            first.step(closure=lambda: self._closure(batch, first))
            return None
        chosen = [every[batch_idx % 2]] if way == "alternate" else every
        if way == "toggle":
            self.toggle_optimizer(first)
        if way != "accumulate" and not (way == "no_zero_grad" and batch_idx % 2):
            for optimizer in chosen:
                optimizer.zero_grad()
        loss = self._whole_loss(batch)
        if way == "two_backwards":
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(self.logits.float().square().mean())
        else:
            self.manual_backward(loss)
        if way == "two_losses":
            self.manual_backward(self._loss((batch[0].flip(1), batch[1])))
        if way == "clip":
            self.clip_gradients(first, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
        if way == "edit_grads":
            for param in self.parameters():
                if param.grad is not None:
                    param.grad.mul_(0.5)
        if way == "toggle":
            self.untoggle_optimizer(first)
        if way != "accumulate" or batch_idx % 2:
            for optimizer in chosen:
                optimizer.step()
        if way == "accumulate" and batch_idx % 2:
            first.zero_grad()
        self.follow_at("step_end")
        return None

    def _closure(self, batch: Batch, optimizer: Any) -> Tensor:
        optimizer.zero_grad()
        loss = self._whole_loss(batch)
        self.manual_backward(loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self._loss(batch)
        self.note("validation loss", loss)
        self.log("val_loss", loss)

    # -- optimizers -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def configure_optimizers(self) -> Any:
        setup = self.program.setup
        if setup == "init_in_configure":
            nn.init.normal_(real(self.net)[-1], std=0.2)
        elif setup == "read_in_configure":
            self.note("norms", torch.stack([param.detach().float().norm() for param in real(self)]))
        elif setup == "anchors_in_configure":
            self.anchors = [param.detach().clone() for param in real(self.net)]
        elif setup == "load_in_configure":
            values = self.net.state_dict()
            self.net.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in values.items()})
        params = [param for param in self.parameters() if param.requires_grad]
        make = OPTIMIZERS[self.program.optimizer]
        if self.program.manual in ("two_optimizers", "alternate", "toggle"):
            half = len(params) // 2
            return [make(groups(self.program.groups, part)) for part in (params[:half], params[half:])]
        if self.program.manual == "same_parameters":
            return [make(params), torch.optim.SGD(params, lr=1e-2, momentum=0.9)]
        return with_schedule(self.program.schedule, make(groups(self.program.groups, params)))


def _louder(module: nn.Module, args: Any, out: Any) -> Any:
    return (out[0] * 1.1, *out[1:]) if isinstance(out, tuple) else out * 1.1


class Around(pl.Callback):
    """What programs do in hooks."""

    def _do(self, hook: str, module: Fuzzed) -> None:
        for name in module.program.features:
            if name in CALLBACKS and CALLBACKS[name][0] == hook:
                CALLBACKS[name][1](module)

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        if module.program.setup == "init_on_fit_start":
            with torch.no_grad():
                for param in real(module.net):
                    param.mul_(0.9)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._do("on_train_batch_start", module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        module.follow_at("epoch_end")

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        module.follow_at("validation_start")
        if "swap_validation" in module.program.features:
            params = real(module.net)
            self._backup = [param.data for param in params]
            for param in params:
                param.data = param.data * 0.9

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if "swap_validation" in module.program.features:
            for param, old in zip(real(module.net), self._backup, strict=True):
                param.data = old


class Listening(Around):
    """The same for the hooks whose mere presence keeps gradients visible."""

    def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
        self._do("on_after_backward", module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self._do("on_before_optimizer_step", module)

    def on_before_zero_grad(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        module.follow_at("before_zero_grad")
        self._do("on_before_zero_grad", module)


class Ending(pl.Callback):
    """Things at the end of a batch; saves the checkpoint that another Trainer goes on from."""

    def __init__(self, save_at: int, path: str) -> None:
        self._save_at, self._path = save_at, path

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        module.follow_at("batch_end")
        for name in module.program.features:
            if name in CALLBACKS and CALLBACKS[name][0] == "on_train_batch_end":
                CALLBACKS[name][1](module)
        if self._save_at and trainer.global_step == self._save_at and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self._path)


def callbacks(program: Program, save_at: int, path: str) -> list[pl.Callback]:
    """Only hooks that the program needs: some keep gradients visible."""
    hooks = {CALLBACKS[name][0] for name in program.features if name in CALLBACKS}
    listens = hooks & {"on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"}
    listens |= {"teacher"} if program.teacher_when == "before_zero_grad" else set()
    return [Listening() if listens else Around(), Ending(save_at, path)]
