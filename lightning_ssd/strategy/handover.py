"""What one session leaves to the next one on the same module: optimizer state, and float32 masters.

``fit``, ``test``, then ``save_checkpoint`` or ``fit`` again: each of them has a session, and only those that fit have
optimizers. The last of these is kept until its optimizers' state has moved on, at the latest into the next ``fit``.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ssd.strategy.session import Session


class Handover:
    """Sessions that ended and still have something that is wanted."""

    def __init__(self) -> None:
        self._last: Session | None = None
        self._fitted: Session | None = None  # the last one with optimizers
        self._masters: dict[nn.Parameter, Tensor] = {}  # mapped

    def begin(self, last: Session | None) -> None:
        """Another session begins after ``last``."""
        if last is None:
            return
        if not last.units:  # its setup failed early
            last.close()
            return
        self._last = last
        if last.optimizers:
            self._close_fitted()
            self._fitted = last
            self._masters = last.masters()

    def before_placing(self) -> None:
        """Parameters are about to move into the new session."""
        if self._last is not None and self._last is not self._fitted:
            self._last.close()
        self._last = None

    def move_into(self, session: Session, optimizers: Iterable[Optimizer]) -> None:
        """Adopt ``optimizers``, with the state they have; what was left is in ``session`` now.

        Raises:
            ConfigurationError: If they have parameters of another module.
        """
        for optimizer in optimizers:
            session.adopt(optimizer)
        session.take_masters(self._masters)
        self._masters = {}
        self._close_fitted()

    @property
    def is_pending(self) -> bool:
        """Whether a session that fitted still has what the current one has not."""
        return self._fitted is not None

    def _close_fitted(self) -> None:
        if self._fitted is not None:
            self._fitted.close()
            self._fitted = None
