"""Looks for programs that fail, from the command line, and makes them small.

``python -m tests.fuzz.search 12 300`` tries the seeds from 12 to 299 and prints each program that fails, and the
smallest that fails like it; ``python -m tests.fuzz.search "Program(seed=3, ...)"`` tries one. ``--plain`` runs plain
Lightning alone, which must never fail; ``--without=foreach,Encoder`` leaves out programs with these words.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.fuzz.play import play
from tests.fuzz.program import Program, draw
from tests.fuzz.run import Verdict, judge

TRIES = 80  # programs that making one smaller may run


def shrink(program: Program, verdict: Verdict) -> tuple[Program, Verdict]:
    """The smallest program found that ends in the same kind of failure."""
    tries = iter(range(TRIES))
    while True:
        for candidate in program.smaller():
            if next(tries, None) is None:
                return program, verdict
            found = judge(candidate)
            if found.kind == verdict.kind:
                program, verdict = candidate, found
                break
        else:
            return program, verdict


def failures(seeds: Iterator[int], counts: Counter[str]) -> Iterator[str]:
    """What goes wrong, as text; the first two of those that look alike are made small."""
    alike: Counter[str] = Counter()
    for seed in seeds:
        program = draw(seed)
        verdict = judge(program)
        counts[verdict.kind] += 1
        if verdict.is_good:
            continue
        text = f"{verdict.kind}: {program}\n    {verdict.detail}"
        look = verdict.kind + re.sub(r"[\d.]+|'[^']*'", "N", verdict.detail)[:60]
        alike[look] += 1
        if alike[look] <= 2 or verdict.kind == "different":
            program, verdict = shrink(program, verdict)
            text += f"\n  smallest: {program}\n    {verdict.detail}"
        yield text


def main() -> None:
    torch.set_num_threads(1)
    words = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    if words[0].startswith("Program"):
        print(judge(eval(words[0], {"Program": Program})))
        return
    left_out = [word for a in sys.argv if a.startswith("--without=") for word in a.partition("=")[2].split(",")]
    seeds = range(int(words[0]), int(words[1]) if len(words) > 1 else int(words[0]) + 1)
    chosen = (seed for seed in seeds if not any(word in str(draw(seed)) for word in left_out))
    if "--plain" in sys.argv:
        for seed in chosen:
            folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
            plain = play(draw(seed), None, folder / "plain")
            shutil.rmtree(folder)
            if plain.error is not None:
                print(f"{draw(seed)}\n    {plain.error!r}\n{plain.trace}", flush=True)
        return
    counts: Counter[str] = Counter()
    for text in failures(chosen, counts):
        print(text, flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
