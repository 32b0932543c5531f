"""LightningCLI finds the strategy by its name, or by its class with settings.

python cli.py fit --trainer.strategy ssd_offload --trainer.max_steps 10
python cli.py fit --config configs/cli.yaml
"""

from lightning.pytorch.cli import LightningCLI
from minimal import Model


def main() -> None:
    """Run the command line."""
    LightningCLI(Model, save_config_callback=None)


if __name__ == "__main__":
    main()
