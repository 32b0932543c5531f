"""Modules that `tests/strategy/test_habits.py` trains, each with a habit in its hooks, its optimizer or its data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader, grad_norm
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader, IterableDataset

from tests.helpers.compatibility_modules import WIDTH, Net, Points

# ------------------------------------------------------------------------------------------------------- gradients


class SecondOrder(Net):
    """A penalty on the gradient of the inputs; in validation inputs are moved along theirs."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        inputs = batch.clone().requires_grad_()
        loss = super().training_step(inputs, batch_idx)
        (grad,) = torch.autograd.grad(loss, inputs, create_graph=True)
        return loss + grad.square().sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            inputs = batch.clone().requires_grad_()
            (grad,) = torch.autograd.grad(self.loss(inputs), inputs)
        super().validation_step(batch + 0.1 * grad.sign(), batch_idx)


class Hooked(Net):
    """Hooks on parameters, on accumulated gradients, and on modules, forwards and backwards."""

    def on_fit_start(self) -> None:
        def halve(param: Tensor) -> None:
            assert param.grad is not None
            param.grad.mul_(0.5)

        self.handles = [param.register_hook(lambda grad: grad.clamp(-0.1, 0.1)) for param in self.first.parameters()]
        self.handles += [param.register_post_accumulate_grad_hook(halve) for param in self.norm.parameters()]
        self.handles += [
            self.last.register_full_backward_hook(lambda module, i, o: self.notes.append(float(o[0].sum()))),
            self.first.register_forward_hook(lambda module, i, o: o + 1),
            self.first.register_forward_pre_hook(lambda module, i: (i[0] * 2,)),
        ]

    def on_fit_end(self) -> None:
        for handle in self.handles:
            handle.remove()


class ChangesGrads(Net):
    def on_after_backward(self) -> None:
        for param in self.parameters():
            assert param.grad is not None
            param.grad += 0.01 * torch.randn_like(param.grad)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self, 2))
        self.notes.append(float(nn.utils.clip_grad_norm_(self.parameters(), 0.2)))


class ReadsGradsLate(Net):
    """After the step gradients are still there, until the next batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.notes.append([param.grad is None for param in self.parameters()])
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.notes.append([None if param.grad is None else param.grad.tolist() for param in self.parameters()])


# ----------------------------------------------------------------------------------------------------------- steps


class WarmsUp(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (self.global_step + 1)
        optimizer.step(closure=closure)


class ClosureFirst(Net):
    """And every other batch changes nothing."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        closure()
        if batch_idx % 2 == 0:
            optimizer.step()


class ChangesState(Net):
    def on_train_batch_end(self, *args: Any) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        for param in self.parameters():
            self.notes.append(float(optimizer.state[param]["exp_avg"].abs().sum()))
            optimizer.state[param]["exp_avg"].mul_(0.5)
        if self.global_step == 3:
            optimizer.state.clear()


class ChangesGroups(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.last.parameters(), 0.05)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step == 2:
            self.trainer.optimizers[0].add_param_group({"params": list(self.first.parameters()), "lr": 0.01})


class MakesOptimizerItself(Net):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.Adam(self.named_parameters(), 0.05)

    def configure_optimizers(self) -> Any:
        return self.optimizer


class NoOptimizer(Net):
    def configure_optimizers(self) -> None:
        return None


class Groups(Net):
    """One parameter a group, a schedule of schedules by step."""

    def configure_optimizers(self) -> Any:
        rates = torch.optim.lr_scheduler
        groups = [{"params": [p], "lr": 0.01 * (i + 1), "name": n} for i, (n, p) in enumerate(self.named_parameters())]
        optimizer = torch.optim.AdamW(groups)
        parts = [rates.LinearLR(optimizer, 0.1, total_iters=2), rates.CosineAnnealingLR(optimizer, 4)]
        schedule = {"scheduler": rates.SequentialLR(optimizer, parts, [2]), "interval": "step", "name": "x"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Lambda(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, nesterov=True, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def optimized_by(make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]) -> type[Net]:
    """A module with an optimizer of the kind."""

    class Optimized(Net):
        def configure_optimizers(self) -> Any:
            return make(self.parameters())

    return Optimized


# --------------------------------------------------------------------------------------------------------- weights


class Restores(Net):
    """Weights become a scaled vector of all of them, and then what they had been."""

    def on_train_start(self) -> None:
        nn.init.constant_(self.first.bias, 0.3)
        self.last.apply(lambda module: nn.init.normal_(module.weight))  # type: ignore[arg-type]

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step == 2:
            self.kept = {name: value.clone() for name, value in self.state_dict().items()}
            vector = nn.utils.parameters_to_vector(self.parameters())
            nn.utils.vector_to_parameters(0.9 * vector, self.parameters())
        if self.global_step == 4:
            self.load_state_dict(self.kept)


class Averages(Net):
    """By hand, by .data and by torch's class; weights are swapped for validation; statistics are renewed at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.last).requires_grad_(False)

    def on_fit_start(self) -> None:
        self.__dict__["other"] = swa_utils.AveragedModel(self.first)
        self.slow = [param.detach().clone() for param in self.norm.parameters()]

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        for average, param in zip(self.average.parameters(), self.last.parameters(), strict=True):
            average.data = average.data * 0.9 + param.data * 0.1
        return super().training_step(batch, batch_idx) + self.average(self.first(batch)).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.other.update_parameters(self.first)
        for slow, param in zip(self.slow, self.norm.parameters(), strict=True):
            slow.lerp_(param.data, 0.5)
            param.data.copy_(slow)

    def on_validation_start(self) -> None:
        self.kept = {param: param.data for param in self.parameters()}
        for param in self.parameters():
            param.data = param.data * 0.5

    def on_validation_end(self) -> None:
        for param, data in self.kept.items():
            param.data = data

    def on_train_end(self) -> None:
        swa_utils.update_bn([torch.ones(4, WIDTH), torch.arange(24.0).view(4, 6)], self)
        self.notes.append([param.tolist() for param in self.other.parameters()])


class Thaws(Net):
    """Parameters require gradients in every other batch; normalisation is in evaluation."""

    def on_train_batch_start(self, *args: Any) -> None:
        self.norm.eval()
        self.first.requires_grad_(self.global_step % 2 == 1)


class LooksInside(Net):
    """Runs itself between batches, and asks its parameters, its Trainer and its optimizer for what they are."""

    def on_train_start(self) -> None:
        trainer, strategy = self.trainer, self.trainer.strategy
        self.notes.append((trainer.world_size, trainer.num_devices, trainer.global_rank, trainer.device_ids))
        self.notes.append(
            (str(strategy.root_device), strategy.broadcast(3), strategy.model is self, trainer.model is self)
        )
        self.notes.append((float(strategy.reduce(torch.tensor(2.0))), str(trainer.precision), str(self.device)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        weight, optimizer = self.first.weight, self.trainer.optimizers[0]
        self.notes.append((weight.is_leaf, weight.stride(), weight.max().item(), weight.tolist(), str(weight.data)))
        self.notes.append((bool((weight > 1).any()), repr(optimizer), len(optimizer.state)))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.eval()
        with torch.inference_mode():
            self.notes.append(self(torch.ones(2, WIDTH)).tolist())
        self.train()


class HasOthers(Net):
    """A model that is no module of it is trained in the step; a probe is trained in validation."""

    def on_fit_start(self) -> None:
        self.others = [nn.Linear(1, 1)]
        self.optimizer = torch.optim.Adam(self.others[0].parameters(), 0.01)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        y = self(batch)
        self.optimizer.zero_grad()
        self.others[0](y.detach()).square().mean().backward()
        self.optimizer.step()
        return super().training_step(batch, batch_idx) + self.others[0](y).square().mean()

    def on_validation_epoch_end(self) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            probe = nn.Linear(WIDTH, 1)
            optimizer = torch.optim.SGD(probe.parameters(), 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                loss = (probe(self.first(torch.ones(4, WIDTH)).detach()) - 1).square().mean()
                loss.backward()
                optimizer.step()
        self.notes.append(float(loss))


class Stops(Net):
    def on_train_batch_end(self, *args: Any) -> None:
        self.trainer.should_stop = self.global_step == 3


class Grows(Net):
    """The number of epochs, while they run; and the head is replaced, which its optimizer does not know."""

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 0:
            self.trainer.fit_loop.max_epochs += 1  # type: ignore[operator]
            self.last = nn.Linear(WIDTH, 1)


class NotStrict(Net):
    """The checkpoint lacks what is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.first.requires_grad_(False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("first")}


class CastsItself(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


# ------------------------------------------------------------------------------------------------------------ data


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(3)))


class Streams(Net):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=2)


class Workers(Net):
    def train_dataloader(self) -> Any:
        return DataLoader(Points(12), batch_size=2, shuffle=True, num_workers=1, persistent_workers=True)


class Combines(Net):
    def train_dataloader(self) -> Any:
        return CombinedLoader([super().train_dataloader(), super().val_dataloader()], "max_size_cycle")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(torch.cat(batch), batch_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return [part + 1 for part in moved] if isinstance(moved, (list, tuple)) else moved


class HasTensors(pl.Callback):
    """A callback whose state is a tensor, and that clamps weights."""

    total = torch.zeros(3)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.total = self.total + 1
        with torch.no_grad():
            for param in module.parameters():
                param.clamp_(-0.5, 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]
