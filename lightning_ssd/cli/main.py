"""The command ``lightning-ssd``: one subcommand per module, registered in one list.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 refused or something is wrong with the data,
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

import lightning_ssd
from lightning_ssd.cli import clean, copy, export, import_, inspect, trace, verify
from lightning_ssd.cli.output import error_line
from lightning_ssd.errors import SSDOffloadError, with_remedy

COMMANDS: tuple[ModuleType, ...] = (clean, copy, export, import_, inspect, trace, verify)
"""Each has NAME, HELP, ``configure(parser)`` and ``run(arguments) -> exit code``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except SSDOffloadError as error:
        error_line(f"error: {error}")
        return 1
    except OSError as error:  # of standard output, or of what was given
        error_line(f"error: {with_remedy(error)}")
        return 1
    except KeyboardInterrupt:
        error_line("interrupted")
        return 130
    return code


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = argparse.ArgumentParser(
        prog="lightning-ssd", description="Tools for training with Trainer(strategy='ssd_offload')."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {lightning_ssd.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        command.configure(subparser)
        subparser.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
