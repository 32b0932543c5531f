"""``lightning-ssd trace``: what a recorded trace says, and which resource limits."""

from __future__ import annotations

import argparse
import json

from lightning_ssd.cli.arguments import path
from lightning_ssd.cli.output import line, table
from lightning_ssd.trace.chrome import read_trace
from lightning_ssd.trace.recorder import Lane
from lightning_ssd.trace.summary import LaneSummary, Summary, summarize

NAME = "trace"
HELP = "Sum up a trace that the callback SSDOffloadTrace has written: busy times, waits, the limiting resource."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "trace", type=path, metavar="FILE", help="the trace, a .json file; to look at it, open ui.perfetto.dev"
    )
    parser.add_argument("--json", action="store_true", help="the numbers as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Sum up."""
    summary = summarize(read_trace(arguments.trace))
    if arguments.json:
        line(json.dumps(summary.to_json()))
    else:
        _show(summary)
    return 0


def _show(summary: Summary) -> None:
    steps = f", {summary.num_steps} step(s)" if summary.num_steps else ""
    line(f"traced   {summary.wall_s:.3f} s{steps}")
    line(f"overlap  {summary.overlap:.0%} of the {summary.disk_busy_s:.3f} s of disk time lie under compute or update")
    line(f"limit    {summary.limit}")
    line()
    rows = [_row(lane, of_lane, summary.wall_s) for lane, of_lane in summary.lanes.items() if lane is not Lane.WAIT]
    table(("lane", "busy", "share", "alone", "spans", "moved", "speed"), rows)
    line()
    waits = [
        (reason, f"{seconds:.3f} s", _share(seconds, summary.wall_s)) for reason, seconds in summary.waits_s.items()
    ]
    table(("training waited", "time", "share"), waits or [("nothing", "", "")])


def _row(lane: Lane, of_lane: LaneSummary, wall_s: float) -> tuple[str, ...]:
    moved, speed = f"{of_lane.nbytes / 1e9:.3f} GB", f"{of_lane.nbytes_per_s / 1e9:.2f} GB/s"
    return (
        lane.value,
        f"{of_lane.busy_s:.3f} s",
        _share(of_lane.busy_s, wall_s),
        f"{of_lane.alone_s:.3f} s",
        str(of_lane.num_spans),
        *((moved, speed) if of_lane.nbytes else ("-", "-")),
    )


def _share(part_s: float, whole_s: float) -> str:
    return f"{part_s / whole_s:.0%}" if whole_s > 0 else "-"
