"""Hands optimizer state and float32 masters from one session to the next one on the same module.

``fit``, then ``test``, then ``save_checkpoint`` or another ``fit``: each has a session of its own, but only a session
that fits has optimizers. The last one with optimizers stays open until their state is in a newer session.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ssd.session.session import Session
from lightning_ssd.units.masters import master_of
from lightning_ssd.units.unit import Unit
from lightning_ssd.units.unit_state import put, tensors_of


class Handover:
    """Earlier sessions that still have values which the current one has not."""

    def __init__(self) -> None:
        self._last: Session | None = None
        self._fitted: Session | None = None  # the last one with optimizers
        self._masters: dict[nn.Parameter, Tensor] = {}  # mapped

    def begin(self, last: Session | None) -> None:
        """A new session begins; ``last`` is the one before."""
        if last is None:
            return
        if not last.units:  # its setup failed early
            last.close()
            return
        self._last = last
        if last.optimizers:
            self._close_fitted()
            self._fitted = last
            self._masters = masters_of(last)

    def before_placing(self) -> None:
        """The parameters' values are about to be written to the new session's store."""
        if self._last is not None and self._last is not self._fitted:
            self._last.close()
        self._last = None

    def move_into(self, session: Session, optimizers: Iterable[Optimizer]) -> None:
        """Have ``session`` adopt ``optimizers`` with their state, and the masters; close the earlier session.

        Raises:
            ConfigurationError: If they have parameters of another module.
        """
        for optimizer in optimizers:
            session.adopt(optimizer)
        take_masters(session, self._masters)
        self._masters = {}
        self._close_fitted()

    @property
    def is_pending(self) -> bool:
        """Whether an earlier session has optimizer state that the current one has not."""
        return self._fitted is not None

    def _close_fitted(self) -> None:
        if self._fitted is not None:
            self._fitted.close()
            self._fitted = None


def masters_of(session: Session) -> dict[nn.Parameter, Tensor]:
    """Float32 masters of 16-bit parameters, mapped; also after `Session.stop`."""
    found: dict[nn.Parameter, Tensor] = {}
    for unit in session.units:
        masters = tensors_of(session.store, unit, "master")
        if masters is not None:
            found.update(zip(unit.params, masters, strict=True))
    return found


def take_masters(session: Session, masters: Mapping[nn.Parameter, Tensor]) -> list[str]:
    """Stream float32 masters of 16-bit parameters into the store of ``session``.

    Returns:
        Names of parameters whose values are not their masters', rounded, and that get new masters therefore; see
        [Note: masters and values].
    """
    changed: list[str] = []
    for unit in session.units:
        if unit.has_master and any(param in masters for param in unit.params):
            session.write_back(unit)  # masters would follow what was written to it a second time
            put(session.store, unit, "master", partial(_master, unit, masters, changed))
    return list(dict.fromkeys(changed))


def _master(unit: Unit, masters: Mapping[nn.Parameter, Tensor], changed: list[str], index: int) -> Tensor:
    param = unit.params[index]
    if param not in masters:
        return param
    found = master_of(param, masters[param])
    if found is not masters[param]:
        changed.append(unit.names[index])
    return found
