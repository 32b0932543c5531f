"""``optimizer.state`` of a streamed optimizer: its state, mapped from the store when it is looked at.

What the user writes, sets or deletes is taken over before the next step, save or ``state_dict``. A dictionary that was
looked up before a step shows the state before that step; look it up again afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.unit import Unit
from lightning_ssd.units.unit_state import ShownState

if TYPE_CHECKING:
    from lightning_ssd.optim.state_io import OptimizerState


class StateView(MutableMapping[nn.Parameter, dict[str, Any]]):
    """The state of each parameter, as `torch.optim.Optimizer.state` has it.

    Args:
        stored: What is shown.
        store: Where it is.
    """

    def __init__(self, stored: OptimizerState, store: StateStore) -> None:
        self._stored = stored
        self._store = store
        self._shown: dict[nn.Parameter, dict[str, Any]] = {}
        self._as_shown: dict[nn.Parameter, dict[str, Any]] = {}
        self._maps: dict[tuple[str, str], ShownState] = {}

    def map(self, unit: Unit, kind: str) -> tuple[Tensor, ...]:
        """The tensors of a kind of a unit; what is written to them is found by `changes`."""
        if (unit.name, kind) not in self._maps:
            self._maps[unit.name, kind] = ShownState(self._store, unit, kind)
        return self._maps[unit.name, kind].tensors

    @property
    def is_looked_at(self) -> bool:
        """Whether anything was shown, set or deleted since the last `clear_shown`."""
        return bool(self._shown)

    def changes(self) -> tuple[dict[nn.Parameter, dict[str, Any]], set[tuple[str, str]]]:
        """The state of parameters that is not what was shown, and the units and kinds of which tensors were written."""
        changed = {}
        for param, state in self._shown.items():
            shown = self._as_shown[param]
            if state.keys() != shown.keys() or any(state[key] is not shown[key] for key in shown):
                changed[param] = state
        return changed, {key for key, mapped in self._maps.items() if mapped.was_written()}

    def clear_shown(self) -> None:
        """Forget what was shown; it is looked up again."""
        self._shown.clear()
        self._as_shown.clear()
        self._maps.clear()

    def inherit(self, store: StateStore) -> None:
        """This is a forked process, which reads from ``store``."""
        self.clear_shown()
        self._store = store

    def __getitem__(self, param: nn.Parameter) -> dict[str, Any]:
        if param not in self._shown:
            state = self._stored.stored_state(param)
            self._shown[param], self._as_shown[param] = state, dict(state)
        return self._shown[param]

    def __setitem__(self, param: nn.Parameter, state: dict[str, Any]) -> None:
        self[param]
        self._shown[param] = state

    def __delitem__(self, param: nn.Parameter) -> None:
        if param not in self:
            raise KeyError(param)
        self[param] = {}

    def __contains__(self, param: object) -> bool:
        if not isinstance(param, nn.Parameter):
            return False
        return bool(self._shown[param]) if param in self._shown else self._stored.has_state(param)

    def __iter__(self) -> Iterator[nn.Parameter]:
        found = dict.fromkeys(param for param in self._stored.params_with_state() if self._shown.get(param, True))
        return iter(found | dict.fromkeys(param for param, state in self._shown.items() if state))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __reduce__(self) -> Any:
        return _plain, (dict(self),)  # `copy` and `pickle` both ask here


def _plain(state: dict[nn.Parameter, dict[str, Any]]) -> dict[nn.Parameter, dict[str, Any]]:
    return defaultdict(dict, state)
