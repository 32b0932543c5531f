"""The callback that writes a trace of some training steps. `for_lightning` and its twin add Lightning's base class."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_ssd.errors import ConfigurationError, TraceError
from lightning_ssd.paths import local_path
from lightning_ssd.strategy.lightning_classes import CallbackBase
from lightning_ssd.strategy.strategy import StrategyMixin
from lightning_ssd.trace.chrome import write_trace
from lightning_ssd.trace.recorder import Trace
from lightning_ssd.trace.summary import summarize


class TraceMixin(CallbackBase):
    """Writes a trace of training steps: when disk, copies, compute and updates were busy.

    The file opens in https://ui.perfetto.dev. ``lightning-ssd trace FILE`` sums it up and names the limiting resource.

    Args:
        path: The file, such as ``"trace.json"``. Missing directories are made; an existing file is replaced.
        first_step: Optimizer steps of the fit before the first traced one. The first step learns the order of units,
            and updates of a step may run into the next, so 2 is the first typical step.
        num_steps: Number of steps to trace.
    """

    def __init__(self, path: str | Path, first_step: int = 2, num_steps: int = 1) -> None:
        self._path = os.fspath(path)
        self._first_step = first_step
        self._num_steps = num_steps
        self._num_done = 0  # optimizer steps of this fit
        self._global_step = 0  # as last seen; several optimizers raise it several times in a step
        self._trace: Trace | None = None  # while tracing
        self._is_written = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse before the first step what cannot be traced or written."""
        if not isinstance(trainer.strategy, StrategyMixin):
            raise ConfigurationError(
                f"SSDOffloadTrace traces strategy='ssd_offload', the Trainer has {type(trainer.strategy).__name__}: "
                "remove the callback, or choose that strategy"
            )
        for name, value, least in (("first_step", self._first_step, 0), ("num_steps", self._num_steps, 1)):
            if type(value) is not int or value < least:
                raise ConfigurationError(f"SSDOffloadTrace: {name}={value!r} is no number of steps from {least}")
        self._path = local_path(self._path, "SSDOffloadTrace: path")
        try:
            os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"SSDOffloadTrace: path={self._path!r} cannot be made: {error.strerror}"
            ) from error
        if os.path.isdir(self._path):
            raise ConfigurationError(f"SSDOffloadTrace: path={self._path!r} is a directory; name a file in it")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to count steps."""
        self._num_done = 0
        self._global_step = trainer.global_step
        self._trace = None
        self._is_written = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the trace if the first traced step begins."""
        if self._num_done != self._first_step or self._trace is not None:
            return
        trace: Trace = trainer.strategy.session.trace
        if trace.is_on:
            raise ConfigurationError(
                f"SSDOffloadTrace: step {self._first_step} is being traced already; give each callback steps of its own"
            )
        trace.start()
        self._trace = trace

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the trace if the last traced step has ended."""
        if trainer.global_step == self._global_step:
            return  # gradients are being accumulated
        self._global_step = trainer.global_step
        self._num_done += 1
        if self._trace is not None and self._num_done == self._first_step + self._num_steps:
            self._write(trainer, self._trace)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """If training ended before the last traced step, warn and write what was traced."""
        if self._is_written:
            return
        warnings.warn(
            f"SSDOffloadTrace: training ended after {self._num_done} step(s): of {self._num_steps} step(s) from step "
            f"{self._first_step} on, {max(0, self._num_done - self._first_step)} were traced",
            stacklevel=2,
        )
        if self._trace is not None:
            self._write(trainer, self._trace)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what was traced. Spans that have not ended show where a step that hung was interrupted."""
        if self._trace is None:
            return
        try:
            self._write(trainer, self._trace)
        except TraceError as error:  # raised from here it would hide ``exception``
            warnings.warn(f"SSDOffloadTrace: {error}", stacklevel=2)

    def _write(self, trainer: Any, trace: Trace) -> None:
        trace.stop()
        self._trace = None
        self._is_written = True
        recording = replace(trace.collect(), num_steps=self._num_done - self._first_step)
        write_trace(self._path, recording)
        logger = logging.getLogger(f"{trainer.strategy._namespace}.ssd_offload")
        logger.info("trace written to %s: %s", self._path, summarize(recording).limit)
