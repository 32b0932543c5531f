"""Draws a trace as an image for the documents: lanes over time. Needs matplotlib.

    python tests/benchmarks/plot_trace.py trace.json trace.svg --color unit --begin 0.5 --end 2

By unit, colours run from the first unit used to the last, so that a forward and a backward show as opposite sweeps, and
one unit can be followed from lane to lane. By kind, each name of a span has a colour. In a lane, what runs at the same
time is drawn in rows; a thread shows its innermost span.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lightning_ssd.trace.chrome import read_trace
from lightning_ssd.trace.recorder import Lane, Recording, Span
from lightning_ssd.trace.summary import Summary, running, summarize

MOST_ROWS = 4  # of a lane; what runs beside so many others is drawn over them
LANE_HEIGHT, GAP = 1.0, 0.25
LETTER_SHARE = 0.0055  # of the image, taken by one letter of a label
TOUCH_S = 1e-6  # what overlaps by less, by rounding, fits in one row
INK, FAINT = "#24292f", "#8c959f"


def main() -> None:
    arguments = parse()
    recording = read_trace(arguments.trace)
    end_s = recording.end_s if arguments.end is None else arguments.end
    figure = draw(recording, color=arguments.color, begin_s=arguments.begin, end_s=end_s)
    # Text stays text, and the file of a trace is the same each time it is drawn.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning-ssd"}):
        metadata = {"Date": None} if arguments.image.endswith(".svg") else None
        figure.savefig(arguments.image, dpi=160, bbox_inches="tight", facecolor="white", metadata=metadata)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", help="written by the callback SSDOffloadTrace")
    parser.add_argument("image", help="what to write; ends in .svg or .png")
    parser.add_argument("--color", choices=("unit", "kind"), default="unit", help="what colours mean (default: unit)")
    parser.add_argument("--begin", type=float, default=0.0, metavar="SECONDS", help="draw from here on")
    parser.add_argument("--end", type=float, default=None, metavar="SECONDS", help="draw up to here")
    return parser.parse_args()


def draw(recording: Recording, *, color: str, begin_s: float, end_s: float) -> Any:
    """A figure of the spans between ``begin_s`` and ``end_s``."""
    by_lane = {
        lane: sorted((s for s in spans if s.begin_s < end_s and s.end_s > begin_s), key=lambda s: s.begin_s)
        for lane, spans in running(recording.spans).items()
    }
    shown = [span for spans in by_lane.values() for span in spans]
    keys = legend_keys(shown if color == "kind" else list(recording.spans), color)
    colors = dict(zip(keys, palette(len(keys), color), strict=True))
    figure, axes = plt.subplots(figsize=(12, 0.62 * len(Lane) + 0.9))
    axes.set_xlim(begin_s, end_s)
    summary = summarize(recording)
    for index, (lane, spans) in enumerate(by_lane.items()):
        bottom = (len(Lane) - 1 - index) * (LANE_HEIGHT + GAP)
        axes.axhspan(bottom, bottom + LANE_HEIGHT, color="#f6f8fa", zorder=0)
        bar_colors = {span: colors.get(key_of(span, color), FAINT) for span in spans}
        labels = {span: span.name if color == "unit" else span.what for span in spans}
        draw_lane(axes, spans, bottom, bar_colors, labels)
        name_lane(axes, lane, bottom, summary)
    finish(axes, summary)
    if color == "unit" and len(keys) > 1:
        said = f"colour: unit, from {keys[0]} (blue) to {keys[-1]} (red)"
        axes.set_xlabel(f"seconds   ({said})", fontsize=8, color=INK)
    if color == "kind":
        handles = [Patch(color=colors[key], label=key) for key in keys]
        figure.legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=6, frameon=False, fontsize=8
        )
    return figure


def key_of(span: Span, color: str) -> str:
    return span.what if color == "unit" else span.name


def legend_keys(spans: list[Span], color: str) -> list[str]:
    """Units in the order in which the model first computes with them, or kinds by name. The rest is grey."""
    if color == "kind":
        return sorted({span.name for span in spans})
    computed = [span for span in spans if span.lane is Lane.COMPUTE] or spans
    return list(dict.fromkeys(span.what for span in sorted(computed, key=lambda span: span.begin_s)))


def palette(number: int, color: str) -> list[Any]:
    if color == "kind":
        return [plt.get_cmap("tab20")(i % 20) for i in range(number)]
    return [plt.get_cmap("turbo")(0.08 + 0.84 * i / max(number - 1, 1)) for i in range(number)]


def draw_lane(axes: Any, spans: list[Span], bottom: float, colors: dict[Span, Any], labels: dict[Span, str]) -> None:
    """Bars in rows, from the top of the lane down."""
    row_of: dict[Span, int] = {}
    ends_s: list[float] = []  # per row
    for span in spans:
        free = next((row for row, row_end_s in enumerate(ends_s) if row_end_s <= span.begin_s + TOUCH_S), len(ends_s))
        if free == len(ends_s) < MOST_ROWS:
            ends_s.append(0.0)
        row_of[span] = free = min(free, MOST_ROWS - 1)
        ends_s[free] = max(ends_s[free], span.end_s)
    height = LANE_HEIGHT / max(len(ends_s), 1)
    for row in range(len(ends_s)):
        mine = [span for span in spans if row_of[span] == row]
        y = bottom + LANE_HEIGHT - (row + 1) * height
        bars = [(span.begin_s, span.end_s - span.begin_s) for span in mine]
        # A thin edge keeps neighbours of one colour apart.
        axes.broken_barh(
            bars, (y, 0.94 * height), facecolors=[colors[s] for s in mine], edgecolors="white", linewidths=0.2, zorder=2
        )
        for span in mine if len(ends_s) <= 2 else []:
            label_bar(axes, span, y + height / 2, axes.get_xlim(), labels[span])


def label_bar(axes: Any, span: Span, y: float, window_s: tuple[float, float], text: str) -> None:
    """``text`` in the middle of what is seen of the bar, if it fits."""
    begin_s, end_s = max(span.begin_s, window_s[0]), min(span.end_s, window_s[1])
    if (end_s - begin_s) / (window_s[1] - window_s[0]) >= LETTER_SHARE * (len(text) + 1):
        label = axes.text((begin_s + end_s) / 2, y, text, ha="center", va="center", fontsize=7, color=INK, zorder=3)
        label.set_bbox({"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.7, "linewidth": 0})


def name_lane(axes: Any, lane: Lane, bottom: float, summary: Summary) -> None:
    """The name to the left, how busy it was to the right."""
    of_lane = summary.lanes[lane]
    busy_s = summary.waited_s if lane is Lane.WAIT else of_lane.busy_s
    said = f"{busy_s / summary.wall_s:.0%}" if summary.wall_s else "-"
    if of_lane.nbytes:
        said += f"\n{of_lane.nbytes_per_s / 1e9:.1f} GB/s"
    across = axes.get_yaxis_transform()
    middle = bottom + LANE_HEIGHT / 2
    axes.text(-0.008, middle, lane.value, transform=across, ha="right", va="center", fontsize=10, color=INK)
    axes.text(1.006, middle, said, transform=across, ha="left", va="center", fontsize=8, color=INK)


def finish(axes: Any, summary: Summary) -> None:
    axes.set_ylim(-GAP, len(Lane) * (LANE_HEIGHT + GAP))
    axes.set_yticks([])
    axes.set_xlabel("seconds", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#d0d7de", linewidth=0.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(summary.limit, fontsize=9, color=INK, loc="left")
    axes.text(1.006, 1.01, "whole trace", transform=axes.transAxes, fontsize=7, color=FAINT, va="bottom")


if __name__ == "__main__":
    main()
