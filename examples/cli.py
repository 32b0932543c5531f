"""LightningCLI: model, data, trainer and strategy from the command line or from a file.

    python cli.py fit --config configs/gpt.yaml
    python cli.py fit --trainer.strategy ssd_offload --trainer.max_steps 10 --model.width 256
    python cli.py fit --help

The strategy is found by its name, or by its class with settings. Model and data are those of ``gpt.py``.
"""

from gpt import GPT, Text
from lightning.pytorch.cli import LightningCLI


def main() -> None:
    """Run the command line."""
    LightningCLI(GPT, Text, save_config_callback=None)


if __name__ == "__main__":
    main()
