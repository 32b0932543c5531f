"""``lightning-ssd export``: writes a checkpoint as a .ckpt file, a Hugging Face folder or a DCP folder."""

from __future__ import annotations

import argparse

from lightning_ssd.checkpoint.progress import byte_bar
from lightning_ssd.checkpoint.writer import Progress
from lightning_ssd.cli.arguments import path
from lightning_ssd.cli.output import error_line, line
from lightning_ssd.convert.export import ExportReport, consolidate, to_safetensors
from lightning_ssd.convert.export_dcp import to_dcp
from lightning_ssd.sizes import fmt, parse_nbytes

NAME = "export"
HELP = (
    "Write a checkpoint as one Lightning .ckpt file, as a Hugging Face folder of safetensors, or as a folder of "
    "torch.distributed.checkpoint."
)

_FILE_SUFFIXES = (".ckpt", ".pt", ".pth")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("checkpoint", type=path, help="a checkpoint with links")
    parser.add_argument("output", type=path, help="a file that ends in .ckpt, .pt or .pth; anything else is a folder")
    parser.add_argument(
        "--format",
        choices=("auto", "ckpt", "safetensors", "dcp"),
        default="auto",
        help="default: ckpt or safetensors by the output's name; dcp is torch.distributed.checkpoint",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing .ckpt file")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load classes of your own from the saved state (runs code from the file; ckpt and dcp)",
    )
    parser.add_argument(
        "--max-shard", type=_size, default="5GB", metavar="SIZE", help="bytes per safetensors file (default 5GB)"
    )
    parser.add_argument(
        "--strip-prefix",
        metavar="PREFIX",
        help="front of the names to remove, such as 'model.' (default: the attribute of the LightningModule that holds "
        "all parameters, if there is one and a Trainer saved the checkpoint; '' removes nothing)",
    )
    parser.add_argument(
        "--config-from", type=path, metavar="FOLDER", help="copy configuration and tokenizer files from here"
    )


def run(arguments: argparse.Namespace) -> int:
    """Export."""
    form = arguments.format
    if form == "auto":
        form = "ckpt" if str(arguments.output).endswith(_FILE_SUFFIXES) else "safetensors"
    unused = [f"--{option.replace('_', '-')}" for option in _unused(form) if getattr(arguments, option)]
    if unused:
        error_line(f"error: {', '.join(unused)} cannot be used with --format {form}")
        return 2
    with byte_bar("written") as progress:
        report = {"ckpt": _export_file, "safetensors": _export_folder, "dcp": _export_dcp}[form](arguments, progress)
    for file in report.files:
        line(file)
    error_line(f"exported {fmt(report.nbytes)} in {len(report.files)} file(s)")
    if report.prefix:
        error_line(f"names are those inside of {report.prefix.rstrip('.')!r}")
    if report.left_out:
        names = ", ".join(report.left_out[:8]) + (", ..." if len(report.left_out) > 8 else "")
        error_line(f"left out, as they do not begin with {report.prefix!r}: {names}")
    return 0


def _unused(form: str) -> tuple[str, ...]:
    """Options that do not apply to a format."""
    for_folders = ("strip_prefix", "config_from")
    return {"ckpt": for_folders, "dcp": ("overwrite", *for_folders), "safetensors": ("overwrite", "trust")}[form]


def _export_dcp(arguments: argparse.Namespace, progress: Progress) -> ExportReport:
    return to_dcp(arguments.checkpoint, arguments.output, weights_only=not arguments.trust, progress=progress)


def _export_file(arguments: argparse.Namespace, progress: Progress) -> ExportReport:
    return consolidate(
        arguments.checkpoint,
        arguments.output,
        overwrite=arguments.overwrite,
        weights_only=not arguments.trust,
        progress=progress,
    )


def _export_folder(arguments: argparse.Namespace, progress: Progress) -> ExportReport:
    return to_safetensors(
        arguments.checkpoint,
        arguments.output,
        max_shard=arguments.max_shard,
        prefix_to_strip=arguments.strip_prefix,
        config_from=arguments.config_from,
        progress=progress,
    )


def _size(text: str) -> int:
    try:
        nbytes = parse_nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not nbytes:
        raise argparse.ArgumentTypeError("a file of 0 bytes holds no tensor")
    return nbytes
