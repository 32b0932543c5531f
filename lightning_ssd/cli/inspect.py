"""``lightning-ssd inspect``: what a checkpoint holds."""

from __future__ import annotations

import argparse

from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.manifest import FileRecord, Manifest
from lightning_ssd.cli.arguments import path
from lightning_ssd.cli.output import line, shown, table
from lightning_ssd.sizes import fmt

NAME = "inspect"
HELP = "Show what a checkpoint holds: step, units, kinds, parameters, sizes."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("checkpoint", type=path, help="a checkpoint with links")
    parser.add_argument("--parameters", action="store_true", help="list every parameter as well")


def run(arguments: argparse.Namespace) -> int:
    """Show."""
    with CheckpointReader(arguments.checkpoint) as reader:
        _show_head(reader.directory, reader.manifest)
        _show_units(reader.manifest)
        if arguments.parameters:
            _show_parameters(reader.manifest)
    return 0


def _show_head(directory: str, manifest: Manifest) -> None:
    written_by = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    line(shown(f"checkpoint  {directory}"))
    line(shown(f"step        {manifest.step}"))
    line(shown(f"created     {manifest.created_at} by {written_by}"))
    line(shown(f"codec       {manifest.codec}, world size {manifest.world_size}"))
    line(shown(f"size        {fmt(manifest.nbytes)}"))
    for record in manifest.optimizers:
        sizes = [len(group["params"]) for group in record.param_groups]
        line(shown(f"optimizer   {record.class_name}: {sum(sizes)} parameters in {len(sizes)} group(s)"))
    if manifest.aliases:
        line(shown("tied        " + ", ".join(f"{alias} = {stored}" for alias, stored in manifest.aliases.items())))


def _show_units(manifest: Manifest) -> None:
    kinds = list(dict.fromkeys(record.kind for record in manifest.files))
    units: dict[str, dict[str, FileRecord]] = {}
    for record in manifest.files:
        units.setdefault(record.unit, {})[record.kind] = record
    rows = []
    for unit, records in units.items():
        numel = {entry.name: entry.numel for record in records.values() for entry in record.entries}
        sizes = [fmt(records[kind].nbytes) if kind in records else "-" for kind in kinds]
        rows.append((unit, str(len(numel)), f"{sum(numel.values()):,}", *sizes))
    line()
    table(("unit", "parameters", "elements", *kinds), rows)


def _show_parameters(manifest: Manifest) -> None:
    rows = []
    for name, places in manifest.parameters.items():
        shape = "x".join(map(str, next(iter(places.values()))[1].shape)) or "scalar"
        rows.append((name, shape, " ".join(f"{kind}:{entry.dtype}" for kind, (_, entry) in places.items())))
    line()
    table(("parameter", "shape", "kinds"), rows)
