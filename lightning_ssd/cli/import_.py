"""``lightning-ssd import``: makes a checkpoint from another format, or for a model with other parameter names."""

from __future__ import annotations

import argparse
import json

from lightning_ssd.checkpoint.progress import byte_bar
from lightning_ssd.cli.arguments import path
from lightning_ssd.cli.output import line
from lightning_ssd.convert.importing import ImportOptions, ImportReport, import_checkpoint
from lightning_ssd.convert.rename import Renaming, read_renaming
from lightning_ssd.sizes import fmt

NAME = "import"
HELP = (
    "Make a checkpoint from a Hugging Face folder, a plain .ckpt, a torch.distributed.checkpoint folder, a DeepSpeed "
    "universal checkpoint, or from a checkpoint of a model whose parameters had other names."
)

_SHOWN = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("source", type=path, help="what to import")
    parser.add_argument("target", type=path, help="the new checkpoint's directory; must not exist")
    parser.add_argument(
        "--map",
        type=path,
        metavar="FILE",
        help='JSON: {"old.name": "new.name", "front.*": "other.*", "unwanted.name": null}',
    )
    parser.add_argument(
        "--like",
        type=path,
        metavar="CHECKPOINT",
        help="a checkpoint that the model saved, at any step: for names, shapes, optimizer groups and what is missing",
    )
    parser.add_argument(
        "--partial", action="store_true", help="take what is missing from --like, and leave out what is left over"
    )
    parser.add_argument(
        "--weights-only", action="store_true", help="import neither optimizer state nor Lightning's state"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="number of optimizer steps of the state, if the source does not hold it"
    )
    parser.add_argument(
        "--trust", action="store_true", help="load classes that the source names (runs code from the file)"
    )
    parser.add_argument("--dry-run", action="store_true", help="report what would be imported; write nothing")
    parser.add_argument("--json", action="store_true", help="write the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Import and report."""
    options = ImportOptions(
        renaming=Renaming({}) if arguments.map is None else read_renaming(arguments.map),
        like=arguments.like,
        partial=arguments.partial,
        weights_only=arguments.weights_only,
        trust=arguments.trust,
        step=arguments.step,
        dry_run=arguments.dry_run,
    )
    with byte_bar("imported") as progress:
        report = import_checkpoint(arguments.source, arguments.target, options, progress)
    if arguments.json:
        line(json.dumps(vars(report), indent=2))
    else:
        _show(report, arguments.target, dry_run=arguments.dry_run)
    return 0


def _show(report: ImportReport, target: str, *, dry_run: bool) -> None:
    line(f"matched    {report.matched} tensor(s)")
    _show_names("renamed", [f"{old} -> {new}" for old, new in report.renamed.items()])
    _show_names("missing", report.missing, ": the values of --like")
    _show_names("left over", report.left_over)
    line(f"optimizer  {report.optimizers}")
    line(f"step       {report.step}")
    if dry_run:
        line("nothing was written")
    else:
        line(f"written    {target}: {fmt(report.nbytes_written)} written, {fmt(report.nbytes_linked)} linked")


def _show_names(title: str, names: list[str], note: str = "") -> None:
    if names:
        more = f", and {len(names) - _SHOWN} more (all with --json)" if len(names) > _SHOWN else ""
        line(f"{title.ljust(10)} {len(names)}{note}: {', '.join(names[:_SHOWN])}{more}")
