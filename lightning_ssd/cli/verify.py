"""``lightning-ssd verify``: read every byte of a checkpoint and compare it with the checksums."""

from __future__ import annotations

import argparse

from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.progress import byte_bar
from lightning_ssd.cli.arguments import path
from lightning_ssd.cli.output import error_line, line
from lightning_ssd.sizes import fmt

NAME = "verify"
HELP = "Read every byte of a checkpoint and compare it with its checksums; exit code 1 if one differs."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("checkpoint", type=path, help="a checkpoint with links")


def run(arguments: argparse.Namespace) -> int:
    """Verify."""
    with byte_bar("verified") as progress, CheckpointReader(arguments.checkpoint) as reader:
        report = reader.verify(progress)
    line(f"{fmt(report.nbytes)} verified, no damage found")
    if report.unchecked:
        error_line(f"{len(report.unchecked)} file(s) were saved without checksums and not compared")
    return 0
