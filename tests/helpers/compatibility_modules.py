"""Modules that `tests/strategy/test_compatibility.py` trains, each with one habit of Lightning projects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as cb
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WIDTH = 6


class Points(Dataset[Tensor]):
    def __init__(self, size: int) -> None:
        self._x = torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> Tensor:
        return self._x[index]


class Net(pl.LightningModule):
    """Two linear layers; it logs, and notes the names of the hooks that are called."""

    def __init__(self, lr: float = 0.05, batch_size: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.lr = batch_size, lr
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)
        self.notes: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x)).tanh())
        return y

    def loss(self, batch: Tensor) -> Tensor:
        return (self(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test", self.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Points(12), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Points(4), batch_size=2)

    test_dataloader = predict_dataloader = val_dataloader


class Momentum(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]


class Plateau(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val"}}


class Quasi(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Insists(torch.optim.SGD):
    """Its step cannot be called without a closure."""

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        loss = closure()
        super().step()
        return loss


class Closing(Net):
    def configure_optimizers(self) -> Any:
        return Insists(self.parameters(), lr=self.lr)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.first.parameters(), 0.05), torch.optim.SGD(self.last.parameters(), 0.05)


class ManualClosure(Manual):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()[0]

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        self.log("loss", optimizer.step(closure=closure))


class Draws(Net):
    """Takes the iterator of the loader."""

    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        loss = self.loss(batch)
        self.log("loss", loss, batch_size=2)
        self.notes.append(batch_idx)
        return loss


class ReturnsDictionary(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "seen": batch}


class TwoLoaders(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(torch.cat([batch["a"], batch["b"]]), batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        return {"a": super().train_dataloader(), "b": super().val_dataloader()}

    def val_dataloader(self) -> Any:
        return [DataLoader(Points(4), batch_size=2), DataLoader(Points(6), batch_size=3)]


class ConfiguresModel(Net):
    def configure_model(self) -> None:
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.extra(super().forward(x))
        return y


class ConfiguresCallbacks(Net):
    def configure_callbacks(self) -> Any:
        return [cb.EarlyStopping("val", patience=1)]


class Freezes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Backbone(Freezes):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.first


class KeepsState(Net):
    """What hooks add to a checkpoint is there again."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"steps": self.global_step}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.notes.append(checkpoint["mine"])

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().state_dict(*args, **kwargs), "counter": torch.tensor(3)}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({k: v for k, v in state_dict.items() if k != "counter"}, *args, **kwargs)


class Transfers(Net):
    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch * 0.5

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch + 1


class Clips(Net):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")


class ScalesLoss(Net):
    def backward(self, loss: Tensor, *args: Any) -> None:  # type: ignore[override]
        (2 * loss).backward()


class ZeroesItself(Net):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


class StepsSchedulers(Momentum):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()
        self.notes.append(scheduler.get_last_lr())
