"""The one changed line: any LightningModule, with its state on the SSD instead of in memory."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel


class Model(BoringModel):
    """Any module: nothing in it knows about the strategy."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any torch optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    Trainer(strategy="ssd_offload", max_steps=10).fit(Model())
