"""Programs drawn at random do what they do under plain Lightning, to the bit, or are refused before they begin.

A failure prints the program as Python; ``python -m tests.fuzz.search "Program(...)"`` runs it again.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fuzz.program import Program, draw
from tests.fuzz.run import EQUAL, LATE, judge
from tests.fuzz.search import failures
from tests.simulated_cuda import requested

QUICK = range(40)
SOAK = range(1000)
PART = 50  # seeds in one test
# The smallest forms of what the search has found, and nobody had thought of.
FOUND = {
    "conjugated complex parameters": Program(163, blocks=("Complex", "Complex"), activations="keep"),
    "... in a second derivative": Program(
        163, blocks=("Complex",), features=("input_grad", "max_over_all"), memory="auto"
    ),
    "two operands in memory for two": Program(162, blocks=("Unused", "Unused"), features=("pair_penalty",)),
    "a teacher and its student there": Program(162, blocks=("Norm",) * 3, teacher="mul_add_data"),
    "the default dtype of a second forward": Program(391, blocks=("Noise", "Noise"), precision="bf16-true"),
    "states of parameters without elements": Program(3, blocks=("Empty",)),
    "states that a parameter has not, resumed": Program(129, optimizer="adafactor", resume_at=2),
    "a write by a method that a forward in eval calls": Program(429, blocks=("ActNorm",), validation="sanity"),
    "gathered after all parameters were touched": Program(
        522, features=("func_grad_gathered", "read_weights"), memory="auto"
    ),
    "a reentrant checkpoint in blocks that run twice": Program(1147, blocks=("CheckpointedReentrant",) * 2, loops=2),
    "touched by code, then evaluated in inference mode": Program(
        225, features=("flat_penalty", "inference_eval"), memory="auto"
    ),
    "a tied weight in a checkpoint in a block": Program(516, blocks=("Checkpointed", "Checkpointed"), tie="blocks"),
}


@pytest.mark.parametrize("seed", QUICK)
def test_a_program_is_equal_or_refused(seed: int) -> None:
    program = draw(seed)
    verdict = judge(program)
    if verdict.kind == "plain fails" and requested():
        pytest.skip("on a device plain Lightning does not run it either")
    assert verdict.is_good, f"{verdict.kind}: {program}\n{verdict.detail}"


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_equal(name: str) -> None:
    verdict = judge(FOUND[name])
    if verdict.kind == "plain fails" and requested():
        pytest.skip("on a device plain Lightning does not run it either")
    assert verdict.kind == EQUAL, f"{verdict.kind}: {FOUND[name]}\n{verdict.detail}"


@pytest.mark.parametrize("memory", ["min", "auto"])
@pytest.mark.parametrize("write", ["write_between", "write_before_zero_grad"])
def test_a_block_written_to_before_its_recompute_is_refused(memory: str, write: str) -> None:
    program = Program(262, blocks=("Block", "Block"), features=(write,), memory=memory, activations="recompute")
    assert judge(program).kind == LATE


@pytest.mark.soak
@pytest.mark.parametrize("first", range(SOAK.start, SOAK.stop, PART))
def test_a_thousand_programs_are_equal_or_refused(first: int) -> None:
    counts: Counter[str] = Counter()
    failed = list(failures(iter(range(first, first + PART)), counts))
    assert not failed, "\n".join(failed)
    assert counts[EQUAL] >= 0.8 * PART, counts  # refusals and programs whose numbers overflow prove little
