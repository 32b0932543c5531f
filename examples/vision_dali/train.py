"""Trains an image classifier, fed by NVIDIA DALI or by plain torch; its state streams from the SSD. See README.md."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from loaders import Batch, DALILoader, TorchLoader
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

LOADERS = {"dali": DALILoader, "torch": TorchLoader}


class Images(LightningDataModule):
    """The folders ``train`` and ``val`` of ``folder``, by one of the two loaders.

    Lightning saves the state of the training loader with each checkpoint, since the loader has ``state_dict``.
    """

    def __init__(self, folder: Path, loader: str, batch_size: int, seed: int) -> None:
        super().__init__()
        self.folder = folder
        self.loader = LOADERS[loader]
        self.batch_size = batch_size
        self.seed = seed

    def _load(self, part: str, training: bool) -> TorchLoader | DALILoader:
        device = self.trainer.strategy.root_device
        device_id = device.index if device.type == "cuda" else None
        return self.loader(self.folder / part, self.batch_size, training=training, seed=self.seed, device_id=device_id)

    @override
    def train_dataloader(self) -> Any:
        return self._load("train", training=True)

    @override
    def val_dataloader(self) -> Any:
        return self._load("val", training=False)


class Block(nn.Module):
    """A residual block of two convolutions, the unit that is streamed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``[batch, width, height, width]`` -> the same."""
        return F.relu(images + self.convolutions(images))


class Classifier(LightningModule):
    """A residual network; nothing in it knows where its weights are.

    Args:
        num_classes: Number of labels.
        width: Channels of each block.
        depth: Number of blocks.
        lr: Learning rate of AdamW.
    """

    def __init__(self, num_classes: int, width: int, depth: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.first = nn.Conv2d(3, width, 7, stride=4, padding=3)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, num_classes)
        self.train_accuracy = MulticlassAccuracy(num_classes)
        self.val_accuracy = MulticlassAccuracy(num_classes)
        self.steps: list[tuple[str, float]] = []  # of this process: digest of the images, and loss

    @override
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(F.relu(self.first(images))).mean((2, 3)))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        scores = self(images)
        loss = F.cross_entropy(scores, labels)
        self.train_accuracy(scores, labels)
        self.log("loss", loss, prog_bar=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True, prog_bar=True)
        self.steps.append((hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()[:16], loss.item()))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.val_accuracy(self(images), labels)
        self.log("val_accuracy", self.val_accuracy, on_epoch=True, prog_bar=True)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main() -> None:
    """Train, save, say the accuracy."""
    args = parse_args()
    seed_everything(args.seed, verbose=False)
    classes = [path for path in (args.images / "train").iterdir() if path.is_dir()]
    module = Classifier(len(classes), args.width, args.depth, args.lr)
    trainer = Trainer(
        strategy=args.strategy,
        accelerator=args.accelerator,
        devices=1,
        max_epochs=args.epochs,
        callbacks=[ModelCheckpoint(args.out, "{step}", save_top_k=-1, every_n_train_steps=args.save_every)],
        logger=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, Images(args.images, args.loader, args.batch_size, args.seed), ckpt_path=args.resume)
    print(f"{trainer.global_step} steps, validation accuracy {trainer.callback_metrics['val_accuracy']:.3f}")
    if args.json is not None:
        args.json.write_text(json.dumps(module.steps))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder that images.py makes: {train,val}/CLASS/FILES")
    add("--loader", choices=sorted(LOADERS), default="dali")
    add("--out", type=Path, default=Path("out"), help="folder of checkpoints")
    add("--resume", type=Path, help="checkpoint to continue from")
    add("--epochs", type=int, default=3)
    add("--save-every", type=int, default=10, help="steps from one checkpoint to the next")
    add("--batch-size", type=int, default=32)
    add("--width", type=int, default=32, help="channels of each block")
    add("--depth", type=int, default=4, help="number of blocks")
    add("--lr", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--strategy", default="ssd_offload", help="ssd_offload, or a plain Lightning one to compare with: auto")
    add("--accelerator", default="auto")
    add("--json", type=Path, help="write a digest of each step's images, and its loss, to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
