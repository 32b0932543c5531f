"""The table of packages in docs/compatibility.md, made from docs/results/packages.jsonl."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HEAD = """## Packages

Models of packages built on Lightning, trained by the package's own entry point: twice by plain Lightning, which must
give the same bits, with `SSDOffloadStrategy(host_memory="min", min_unit_numel=0, update="torch")`, and with the
defaults of `"ssd_offload"`. *Equal* means every bit:

- losses, logged values, weights and predictions are those of plain Lightning;
- reload: the model that the package's own loader reads predicts what the trained one predicts;
- resume: a run that the strategy resumes is the plain run that was not stopped;
- resume by plain: what plain Lightning makes of our checkpoint is what it makes of its own.

Each number is in `docs/results/packages.jsonl`; `make packages` trains them again.
"""
COMPARED = {
    "losses": "losses",
    "logged": "logged values",
    "weights": "weights",
    "predictions": "predictions",
    "reloaded": "reload",
    "resumed": "resume",
    "resumed_by_plain": "resume by plain",
}


def packages_table(results: Path) -> str:
    """The section's text.

    Args:
        results: A file of the lines that `tests.packages.compare` writes.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for text in results.read_text().splitlines():
        line = json.loads(text)
        found[line["package"]].append(line)
    rows = [_row(package, lines) for package, lines in sorted(found.items())]
    return "\n".join([HEAD, "| package | models | trained and read by | equal |", "|---|---|---|---|", *rows]) + "\n"


def _row(package: str, lines: Sequence[dict[str, Any]]) -> str:
    done = [line for line in lines if "losses" in line]
    models = "; ".join(dict.fromkeys(line["model"] for line in lines))
    ways = dict.fromkeys(f"{_general(line, 'entry')}, {_general(line, 'loader')}" for line in done)
    equal = [word for key, word in COMPARED.items() if any(key in line for line in done) and not _different(done, key)]
    cells = [
        f"{package} {lines[0]['version']}",
        models,
        "; ".join(ways),
        ". ".join([", ".join(equal), *_others(lines)]),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _general(line: dict[str, Any], key: str) -> str:
    """An entry point with ``*`` in place of the model's class."""
    return f"`{line[key].replace(line['model'].partition(',')[0], '*')}`"


def _others(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What is not equal, has failed, or is refused: each once."""
    for key, word in COMPARED.items():
        for line in _different(lines, key)[:1]:
            yield f"Not {word} ({line['model']}, {line['setting']}): {line.get('resume_note', line[key])}"
    for key in ("refused", "error"):
        yield from dict.fromkeys(f"{key.capitalize()}: {line['model']}, {line[key]}" for line in lines if key in line)


def _different(lines: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [line for line in lines if line.get(key, 0.0)]
