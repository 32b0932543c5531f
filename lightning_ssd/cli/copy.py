"""``lightning-ssd copy``: a checkpoint to another disk, checked, and gone on with after an interruption."""

from __future__ import annotations

import argparse

from lightning_ssd.checkpoint.copy import copy_checkpoint
from lightning_ssd.checkpoint.progress import byte_bar
from lightning_ssd.cli.arguments import path
from lightning_ssd.cli.output import line
from lightning_ssd.sizes import fmt

NAME = "copy"
HELP = "Copy a checkpoint, compare every byte with its checksums, and go on where an interrupted copy was."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("checkpoint", type=path, help="checkpoint directory")
    parser.add_argument("target", type=path, help="the copy's directory; must not exist")


def run(arguments: argparse.Namespace) -> int:
    """Copy."""
    with byte_bar("copied and compared") as progress:
        report = copy_checkpoint(arguments.checkpoint, arguments.target, progress)
    line(f"{fmt(report.nbytes_copied)} copied, {fmt(report.nbytes_kept)} were there and right, all compared")
    return 0
