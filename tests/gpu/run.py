"""Everything that needs a GPU, in parts; a JSON line for each result, on disk before the next begins.

    python -m tests.gpu DIRECTORY --out FOLDER [--parts machine tests sanitizer sizes] [--minutes 9]
    GPU_DEVICE=simulated python -m tests.gpu ...     # tries all of it out without a GPU

State of training goes to DIRECTORY, which must be on the disk that is measured. FOLDER gets ``gpu.jsonl``, ``gpu.md``
(a table) and ``gpu_tests.txt``. Ends with 1 if a test failed, or a job of ours. No network is needed. Where one call
may take ten minutes, two do more: ``--parts machine tests sanitizer``, then ``--parts machine sizes``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from tests.gpu.device import IS_SIMULATED, working

from lightning_ssd.sizes import parse_nbytes  # isort: skip
from tests.benchmarks.gpt import SIZES  # isort: skip
from tests.benchmarks.support import emit, say  # isort: skip
from tests.gpu.build import call  # isort: skip
from tests.gpu.sizes import LEAST_HOST_NBYTES, SYSTEMS, Line, Settings, Sizes, run_within  # isort: skip
from tests.gpu.table import table  # isort: skip
from tests.gpu.worker import NUM_LAST, Job  # isort: skip

PARTS = ("machine", "tests", "sanitizer", "sizes")
TESTS_S, SANITIZER_S = (900 if IS_SIMULATED else 240), 90
BATCH, BATCHES = 8, (1, 2 if IS_SIMULATED else 32)  # of every size; of the largest that ran, ours alone
ORDER = ("350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")


def main(built: Line) -> None:
    """Run the parts that are asked for; ``built`` tells of the native module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny"] if IS_SIMULATED else ORDER)
    parser.add_argument("--device-memory", default="24GiB")
    parser.add_argument("--seq", type=int, default=64 if IS_SIMULATED else 1024)
    parser.add_argument("--steps", type=int, default=4 + NUM_LAST)
    parser.add_argument("--tests", nargs="*", default=[], help="further arguments of pytest")
    args = parser.parse_args()
    for directory in (args.directory, args.out):
        directory.mkdir(parents=True, exist_ok=True)
    run = Run(args, time.monotonic() + 60 * args.minutes)
    run.emit(built)
    with working():
        for part in (part for part in PARTS if part in args.parts):
            say(f"gpu: {part}, {run.left_s():.0f} s left")
            getattr(run, part)()
    (args.out / "gpu.md").write_text(table(run.lines))
    sys.stdout.write(table(run.lines))
    raise SystemExit(int(run.has_failed))


class Run:
    """The parts, each a method of its name.

    Attributes:
        lines: What was found so far.
        has_failed: Whether a test failed, or a job of ours.
    """

    def __init__(self, args: argparse.Namespace, deadline_s: float) -> None:
        self._args = args
        self._deadline_s = deadline_s
        self.lines: list[Line] = []
        self.has_failed = False

    def left_s(self) -> float:
        """Seconds until all must be over."""
        return self._deadline_s - time.monotonic()

    def emit(self, line: Line) -> None:
        """Write a line, and keep it."""
        self.lines.append(line)
        emit({"benchmark": "gpu", **line}, self._args.out / "gpu.jsonl")

    def machine(self) -> None:
        """What it is, and what its parts do alone."""
        from tests.gpu.pieces import machine

        begin = time.monotonic()
        self.emit({"part": "machine", **machine(self._args.directory), "took_s": time.monotonic() - begin})

    def tests(self) -> None:
        """Those marked cuda."""
        begin = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-v", "-m", "cuda", "--tb=short", "-p", "no:cacheprovider"]
        environment = {"TEST_DEVICE": "simulated_cuda"} if IS_SIMULATED else {}
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "tests.xml"
            command += ["tests/parity/test_cuda.py", f"--junitxml={report}", *self._args.tests]
            output, is_complete = call(command, min(TESTS_S, self.left_s()), **environment)
            line = {"part": "tests", "is_complete": is_complete, **outcomes(report, output)}
        (self._args.out / "gpu_tests.txt").write_text(output[-1_000_000:])
        self.has_failed |= not is_complete or not line["num_passed"] or bool(line["failed"])
        self.emit({**line, "took_s": time.monotonic() - begin})

    def sanitizer(self) -> None:
        """A small job of ours under torch's check of streams, which knows what events order."""
        line: Line = {"part": "sanitizer"}
        if IS_SIMULATED:
            return self.emit({**line, "left_out": "the simulated device checks itself"})
        with tempfile.TemporaryDirectory(prefix="gpu-", dir=self._args.directory) as path:
            nbytes = parse_nbytes(self._args.device_memory)
            job = Job("ours", "tiny", 2, 64, 2 + NUM_LAST, path, nbytes, LEAST_HOST_NBYTES)
            result = run_within(job, min(SANITIZER_S, self.left_s()), TORCH_CUDA_SANITIZER="1")
        kept = ("error", "errors", "step_s", "losses")
        self.emit({**line, "job": dataclasses.asdict(job), **{key: result[key] for key in kept if key in result}})

    def sizes(self) -> None:
        """Every system at every size, then other batches of the largest of ours that ran."""
        args = self._args
        machine = next((line for line in self.lines if line["part"] == "machine"), None)
        if machine is None:
            raise SystemExit("gpu: the part 'sizes' needs the part 'machine' in the same call")
        nbytes = parse_nbytes(args.device_memory)
        sizes = Sizes(Settings(args.directory, nbytes, args.seq, args.steps, self._deadline_s), machine, self.emit)
        for size in args.sizes:
            for system in SYSTEMS:
                is_right = sizes.run(size, system, BATCH)
                self.has_failed |= system == "ours" and not is_right
        ran = [line["size"] for line in self.lines if line.get("system") == "ours" and "step_s" in line]
        for batch in BATCHES if ran else ():
            self.has_failed |= not sizes.run(ran[-1], "ours", batch)


def outcomes(report: Path, output: str) -> dict[str, Any]:
    """Of a run of pytest by its report, or, if it was killed before it wrote one, by its ``output`` until then."""
    if not report.exists():
        ended = [line.split() for line in output.splitlines() if "::" in line]
        by_word = {word: [words[0] for words in ended if word in words[1:]] for word in ("PASSED", "FAILED", "SKIPPED")}
        failed = dict.fromkeys(by_word["FAILED"], "")
        return {"num_passed": len(by_word["PASSED"]), "failed": failed, "skipped": by_word["SKIPPED"]}
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {case.get("name"): _text(case) for case in cases if case.find("failure") is not None}
    failed |= {case.get("name"): _text(case) for case in cases if case.find("error") is not None}
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    num_passed = len(cases) - len(failed) - len(skipped)
    return {"num_passed": num_passed, "failed": failed, "skipped": skipped}


def _text(case: ElementTree.Element) -> str:
    found = next(child for child in case if child.tag in ("failure", "error"))
    return f"{found.get('message')}\n{found.text}"[-1500:]


if __name__ == "__main__":
    main()
