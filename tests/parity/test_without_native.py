"""Without the native module everything works the same, slower, and says so once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import sys, warnings
sys.modules["lightning_ssd._native"] = None
from pathlib import Path
import torch
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from lightning_ssd.strategy.for_lightning import SSDOffloadStrategy
    from tests.helpers.models import GPT
    from tests.helpers.training import assert_equal, train
    from lightning_ssd.kernels import api
    native = SSDOffloadStrategy(host_memory="min", min_unit_numel=0, update="native", verify_reads=True)
    ours = train(Path(sys.argv[1]), GPT, native, max_steps=5)
ours_said = [str(w.message) for w in seen if "native" in str(w.message)]
assert not api.is_native()
assert ours.trainer.strategy.session.engine.name == "python", ours.trainer.strategy.session.engine.reason
assert len(ours_said) == 1, ours_said
plain = train(Path(sys.argv[1]), GPT, max_steps=5)
assert_equal(plain, ours)
"""


def test_training_without_the_native_module_is_equal(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
