"""The one changed line: any LightningModule, with its state on the SSD instead of in memory."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.optim.lr_scheduler import LRScheduler


class Model(BoringModel):
    """Any module: nothing in it knows about the strategy."""

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LRScheduler]]:
        """Any torch optimizer."""
        return [torch.optim.AdamW(self.parameters(), lr=1e-3)], []


if __name__ == "__main__":
    Trainer(strategy="ssd_offload", max_steps=10).fit(Model())
