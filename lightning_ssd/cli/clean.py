"""``lightning-ssd clean``: shows and removes stale files of dead runs, saves, copies and exports."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_ssd.checkpoint.directory import is_checkpoint
from lightning_ssd.cli import arguments as types
from lightning_ssd.cli.output import error_line, fmt_age, line, table
from lightning_ssd.cli.stale_files import find_stale, may_be_stale, remove_stale
from lightning_ssd.paths import local_path
from lightning_ssd.sizes import fmt
from lightning_ssd.store.run_directory import DeadRun, dead_run, is_run_directory, remove_dead_run

NAME = "clean"
_RUN = "dead run"
_KEPT = "kept store"
HELP = "Show stale files of dead runs, saves, copies and exports; remove them with --yes, or after a prompt."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "paths",
        type=types.path,
        nargs="*",
        metavar="PATH",
        help="where to look, subdirectories too (default: $LIGHTNING_SSD_PATH or .)",
    )
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    parser.add_argument("--kept", action="store_true", help="also stores that a run was told to keep (keep_store=True)")
    parser.add_argument("--json", action="store_true", help="write the result as JSON; asks nothing")
    parser.add_argument(
        "--other-hosts",
        action="store_true",
        help="also runs of other machines, whose locks may not be visible here; use it only if none is alive",
    )


@dataclass
class _Find:
    """One thing to remove. ``kept_because`` says why it stays, or is empty; ``removed`` whether it was removed."""

    path: str
    what: str
    nbytes: int
    age_s: float
    kept_because: str = ""
    removed: bool = False


def run(arguments: argparse.Namespace) -> int:
    """Show, ask, remove."""
    paths = [os.path.abspath(path) for path in arguments.paths or [_default()]]
    absent = [path for path in paths if not os.path.isdir(path)]
    for path in absent:
        error_line(f"error: {path!r} is not a directory")
    if absent:
        return 1
    finds = list({find.path: find for path in paths for find in _search(path, arguments)}.values())
    failed = 0
    if not arguments.json:
        _show(finds)
    if arguments.yes or (not arguments.json and _confirmed(finds)):
        failed = sum(not _remove(find, kept=arguments.kept) for find in finds if not find.kept_because)
    if arguments.json:
        line(json.dumps([vars(find) for find in finds], indent=2))
    elif any(find.removed for find in finds):
        removed = [find for find in finds if find.removed]
        line(f"removed {len(removed)}, {fmt(sum(find.nbytes for find in removed))} freed")
    return 1 if failed else 0


def _default() -> str:
    chosen = os.environ.get("LIGHTNING_SSD_PATH")
    return local_path(chosen, "$LIGHTNING_SSD_PATH") if chosen else "."


def _search(top: str, arguments: argparse.Namespace) -> Iterator[_Find]:
    """Walk down without following symlinks; run directories and whole checkpoints are not entered."""
    for path in (top, *_below(top)):
        if is_run_directory(os.path.basename(path)):
            run = dead_run(path)
            if run is not None:
                yield _Find(path, _KEPT if run.is_kept else _RUN, run.nbytes, run.age_s, _why_kept(run, arguments))
        elif (found := find_stale(path)) is not None:
            yield _Find(path, found.what, found.nbytes, found.age_s, found.kept_because)


def _why_kept(run: DeadRun, arguments: argparse.Namespace) -> str:
    if run.is_kept and not arguments.kept:
        return "left on purpose by keep_store=True: see --kept"
    if run.host not in ("", socket.gethostname()) and not arguments.other_hosts:
        return f"made on {run.host!r}: see --other-hosts"
    return ""


def _below(top: str) -> Iterator[str]:
    for folder, names, files in os.walk(top):
        names.sort()
        paths = [os.path.join(folder, name) for name in names]
        found = [path for path in paths if not os.path.islink(path)]
        yield from found
        yield from (os.path.join(folder, name) for name in sorted(files) if may_be_stale(name))
        names[:] = [os.path.basename(path) for path in found if not _is_closed(path)]


def _is_closed(path: str) -> bool:
    try:
        return is_run_directory(os.path.basename(path)) or is_checkpoint(path)
    except OSError:
        return True


def _show(finds: list[_Find]) -> None:
    if not finds:
        line("nothing stale was found")
        return
    rows = [(find.path, find.what, fmt(find.nbytes), fmt_age(find.age_s), find.kept_because) for find in finds]
    table(("path", "what", "frees", "unchanged for", ""), rows)
    going = [find for find in finds if not find.kept_because]
    line(f"{len(going)} can go, {fmt(sum(find.nbytes for find in going))}; --yes removes them")


def _confirmed(finds: list[_Find]) -> bool:
    if not any(not find.kept_because for find in finds) or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    sys.stderr.write("remove them now? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _remove(find: _Find, *, kept: bool) -> bool:
    """Remove one; return False after an error. It is no error if another process locked or removed it meanwhile."""
    try:
        is_run = find.what in (_RUN, _KEPT)
        find.removed = remove_dead_run(find.path, kept=kept) if is_run else remove_stale(find.path)
        find.kept_because = "" if find.removed else "somebody uses it now, or has removed it"
    except FileNotFoundError:
        find.kept_because = "somebody has removed it"
    except OSError as error:
        find.kept_because = f"not removed: {error.strerror}"
        error_line(f"error: {find.path!r}: {error.strerror}; what this program did not make stays")
        return False
    return True
