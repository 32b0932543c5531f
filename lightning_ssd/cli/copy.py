"""``lightning-ssd copy``: copies a checkpoint to another disk, verifies it, and resumes an interrupted copy."""

from __future__ import annotations

import argparse

from lightning_ssd.checkpoint.progress import byte_bar
from lightning_ssd.cli.arguments import path
from lightning_ssd.cli.output import line
from lightning_ssd.convert.copy import copy_checkpoint
from lightning_ssd.sizes import fmt

NAME = "copy"
HELP = "Copy a checkpoint and compare every byte with its checksums; resumes an interrupted copy."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("checkpoint", type=path, help="a checkpoint with links")
    parser.add_argument("target", type=path, help="the copy's name; must not exist")


def run(arguments: argparse.Namespace) -> int:
    """Copy."""
    with byte_bar("copied and compared") as progress:
        report = copy_checkpoint(arguments.checkpoint, arguments.target, progress)
    line(f"{fmt(report.nbytes_copied)} copied, {fmt(report.nbytes_reused)} were there already, all compared")
    return 0
