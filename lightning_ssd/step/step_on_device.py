"""Where code outside of modules finds the values of parameters in the course of a step on a device.

[Note: a step on a device] Values are on the device from the beginning of the training step to the end of backward, in
hooks between the two as well, so that they go with activations and with each other. From there to the end of the step
they are on the host, as gradients are. At both turns no parameter keeps its values on the other side.
"""

from __future__ import annotations

from lightning_ssd.units.param_cache import ParamCache


class StepOnDevice:
    """Tells the step's state which side it is; see [Note: a step on a device].

    Args:
        cache: The units.
        is_off_host: Compute has memory of its own; if not, nothing is done.
    """

    def __init__(self, cache: ParamCache, *, is_off_host: bool) -> None:
        self._cache = cache
        self._is_off_host = is_off_host

    def begin(self) -> None:
        """The step begins or goes on: what code has mapped on the host is offloaded."""
        step = self._cache.step
        if not self._is_off_host:
            return
        step.override = None
        if not step.is_running:
            self._offload_mapped()

    def await_backward(self) -> None:
        """The training step has returned, and its backward is to come."""
        self._cache.step.override = True if self._is_off_host else None

    def begin_backward(self) -> None:
        """Autograd runs, or runs on."""
        if self._cache.step.override is False:
            self._cache.step.override = None
            self._offload_mapped()

    def end_backward(self) -> None:
        """Autograd is through, in a backward of the Trainer's."""
        if self._is_off_host:
            self._cache.offload_idle()
            self._cache.step.override = False

    def end(self) -> None:
        """The step is over, or was given up."""
        self._cache.step.override = None

    def _offload_mapped(self) -> None:
        for unit in self._cache.units:
            if unit.mapped is not None:
                self._cache.write_back(unit)
