"""What the GPU's checks make of what they measured; arithmetic alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.guess import START_S, Guess
from tests.gpu.profile import Work, common, figures, merged, read_chrome
from tests.gpu.run import outcomes
from tests.gpu.table import table


def test_shares_of_a_step() -> None:
    work = [
        Work("kernel", 0.0, 2.0),
        Work("kernel", 1.0, 3.0),  # beside it, on another stream
        Work("to_device", 2.0, 4.0, 4 * 10**9),
        Work("to_host", 7.0, 8.0, 10**9, is_pinned=False),
    ]
    found = figures(work, 10.0)
    assert found["busy_share"] == pytest.approx(0.3)
    assert found["copies_under_kernels"] == pytest.approx(1 / 3)
    assert (found["to_device_nbytes"], found["to_device_gbps"]) == (4 * 10**9, pytest.approx(2.0))
    assert (found["to_device_pageable_nbytes"], found["to_host_pageable_nbytes"]) == (0, 10**9)
    assert figures([], 1.0)["copies_under_kernels"] is None


def test_unions() -> None:
    assert merged([(3, 4), (0, 1), (1, 2)]) == [(0, 2), (3, 4)]
    assert common([(0, 2), (3, 6)], [(1, 4), (5, 9)]) == [(1, 2), (3, 4), (5, 6)]


def test_a_profile_of_torch_is_read() -> None:
    def event(category: str, name: str, duration: float, **args: int) -> dict[str, object]:
        return {"ph": "X", "cat": category, "name": name, "ts": 10.0, "dur": duration, "args": args}

    found = read_chrome(
        [
            event("kernel", "gemm", 5),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 3, bytes=8),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 3, bytes=4),
            event("cuda_runtime", "cudaEventSynchronize", 1000),
            event("cuda_runtime", "cudaMemcpyAsync", 2),  # it was launched and not waited for
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert [(w.kind, w.nbytes, w.is_pinned) for w in found["work"]] == [
        ("kernel", 0, True),
        ("to_device", 8, True),
        ("to_host", 4, False),
    ]
    assert found["host_waits"] == {"cudaEventSynchronize": {"num": 1, "s": pytest.approx(1e-3)}}


def test_a_guess_has_a_start_that_does_not_grow() -> None:
    guess = Guess(1e-8)
    assert guess.seconds(10**9) == pytest.approx(START_S + 10)
    guess.add(10**9, START_S + 30)
    assert guess.seconds(3 * 10**9) == pytest.approx(START_S + 90)
    guess.add(2 * 10**9, START_S + 50)
    assert guess.seconds(4 * 10**9) == pytest.approx(START_S + 90)
    guess.add(3 * 10**9, 1.0)  # the largest was fast: it is not guessed that a larger one takes less
    assert guess.seconds(4 * 10**9) >= 1.0


def test_a_report_of_tests_is_read(tmp_path: Path) -> None:
    killed = outcomes(tmp_path / "none.xml", "t.py::a[x] PASSED [ 3%]\nt.py::b FAILED [ 6%]\nt.py::c \n")
    assert killed == {"num_passed": 1, "failed": {"t.py::b": ""}, "skipped": []}
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="no">at</failure></testcase>'
        '<testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    found = outcomes(tmp_path / "tests.xml", "")
    assert (found["num_passed"], found["failed"], found["skipped"]) == (1, {"b": "no\nat"}, ["c"])


def test_the_table_has_what_ran_and_why_the_rest_did_not() -> None:
    job = {"part": "sizes", "size": "350m", "system": "ours", "batch": 8}
    text = table(
        [
            {"part": "tests", "num_passed": 3, "failed": {"b": "no"}},
            {**job, "step_s": 0.5, "profile": {"busy_share": 0.25, "host_waits": {"event": {"num": 2, "s": 0.1}}}},
            {**job, "system": "plain", "left_out": "too large"},
            {**job, "system": "fsdp2", "error": "Traceback\nOSError: full"},
        ]
    )
    assert "tests: {'num_passed': 3, 'failed': ['b']}" in text
    assert "| 350m | ours | 8 | 0.500 |" in text
    assert "25.0" in text
    assert "event x 2 (0.100 s)" in text
    assert "350m plain x 8: too large" in text
    assert "350m fsdp2 x 8: OSError: full" in text
