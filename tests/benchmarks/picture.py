"""Draws the README's picture of memory and speed from ``docs/results``; it needs matplotlib.

``python -m tests.benchmarks.picture``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PICTURE = RESULTS / "memory_and_speed.svg"


class Panel(NamedTuple):
    """Bars of one panel: for each series, a value per model; None where there is no measurement."""

    title: str
    models: list[str]
    series: dict[str, list[float | None]]


COLORS = {
    "plain, at least": "#9aa0a6",
    "plain, in memory": "#9aa0a6",
    "DeepSpeed ZeRO-Infinity": "#e8a33d",
    "ssd_offload, in no more memory": "#7fb0de",
    "ssd_offload, 512 MiB": "#1f5f9e",
    "ssd_offload, 1 GiB": "#1f5f9e",
}


def panels() -> tuple[Panel, Panel]:
    """What the picture shows: the first lines of each model in ``memory.jsonl`` and ``peers.jsonl``, on an EPYC."""
    memory = [line for line in lines_of("memory.jsonl") if line["precision"] == "bf16-true"]
    peers = [line for line in lines_of("peers.jsonl") if line["cpu"] == "AMD EPYC"]
    gib = 2**30
    first = Panel(
        "peak memory, GiB",
        [_millions(line["numel"]) for line in memory],
        {
            "plain, at least": [line["plain_at_least_nbytes"] / gib for line in memory],
            "ssd_offload, 1 GiB": [line["peak_anonymous_above_base_nbytes"] / gib for line in memory],
        },
    )
    second = Panel(
        "seconds per step",
        [line["model"].upper() for line in peers],
        {
            "DeepSpeed ZeRO-Infinity": [
                min(s for name, s in line["step_s"].items() if name.startswith("deepspeed")) for line in peers
            ],
            "ssd_offload, 512 MiB": [line["step_s"]["small"] for line in peers],
            "ssd_offload, in no more memory": [line["step_s"]["same_memory"] for line in peers],
            "plain, in memory": [line["in_memory_step_s"] for line in peers],
        },
    )
    return first, second


def labels() -> list[str]:
    """The numbers on the bars."""
    return [
        f"{value:.2f}"
        for panel in panels()
        for values in panel.series.values()
        for value in values
        if value is not None
    ]


def lines_of(name: str) -> list[dict[str, Any]]:
    """What a file of ``docs/results`` says."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def _millions(numel: int) -> str:
    return f"{numel / 1e6:.0f}M" if numel < 1e9 else f"{numel / 1e9:.1f}B"


def draw() -> None:
    """Write the picture. Its text is text, so that a test can compare the numbers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lightning-ssd", "font.family": "sans-serif"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.1), layout="constrained", width_ratios=(2, 3))
    for panel, axis in zip(panels(), axes, strict=True):
        _draw_panel(panel, axis)
    figure.savefig(PICTURE, metadata={"Date": None})
    pyplot.close(figure)


def _draw_panel(panel: Panel, axis: Any) -> None:
    width = 0.8 / len(panel.series)
    lowest = min(value for values in panel.series.values() for value in values if value is not None)
    for number, (name, values) in enumerate(panel.series.items()):
        places = [index + (number - (len(panel.series) - 1) / 2) * width for index in range(len(values))]
        heights = [lowest / 2 if value is None else value for value in values]
        bars = axis.bar(places, heights, 0.92 * width, label=name, color=COLORS[name])
        shown = ["does not fit" if value is None else f"{value:.2f}" for value in values]
        axis.bar_label(bars, shown, padding=3, fontsize=8, rotation=90 if len(panel.series) > 2 else 0)
    axis.set_yscale("log")
    axis.set_ylim(lowest / 2, 3 * max(value for values in panel.series.values() for value in values if value))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_title(f"{panel.title} (log scale)", loc="left", fontsize=11)
    axis.set_xticks(range(len(panel.models)), panel.models)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left")


if __name__ == "__main__":
    draw()
    sys.stdout.write(f"{PICTURE}\n")
