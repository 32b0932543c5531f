"""The state of an adopted optimizer: in the store, by parameter, and as ``torch.optim`` shows and saves it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ssd.device.on_host import plain
from lightning_ssd.errors import CheckpointError, ConfigurationError, OptimizerStateError, StoreError
from lightning_ssd.optim.rules import Rule, is_full
from lightning_ssd.optim.state_view import StateView
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.layout import suffix_of
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.unit import Unit
from lightning_ssd.units.unit_state import forget, put, state_kinds_of, tensors_of


class OptimizerState(ABC):
    """What one optimizer keeps of its parameters. Arguments as of `OptimizerAdapter`.

    Attributes:
        optimizer: The user's.
        rule: What an update does.
        suffix: Of the kinds that its states have in the store; [Note: suffix].
    """

    def __init__(self, optimizer: Optimizer, rule: Rule, units: list[Unit], store: StateStore, *, suffix: str) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self.suffix = suffix
        self._store = store
        self._places = {param: (unit, i) for unit in units for i, param in enumerate(unit.params)}
        self._scalars: dict[nn.Parameter, dict[str, Any]] = {}
        self._initialised: dict[nn.Parameter, set[str]] = {}
        self._view = StateView(self, store)

    @abstractmethod
    def drain(self) -> None:
        """Return when no update is pending."""

    def params(self) -> Iterable[nn.Parameter]:
        """Its parameters, group by group."""
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _units(self) -> Iterable[Unit]:
        return {self._places[p][0].name: self._places[p][0] for p in self.params() if p in self._places}.values()

    def _units_with_grad(self) -> Iterable[tuple[Unit, dict[int, Tensor]]]:
        """Units that have a visible gradient, with their gradients by parameter index."""
        for unit in self._units():
            grads = {i: plain(p.grad) for i, p in enumerate(unit.params) if p.grad is not None}
            if grads:
                yield unit, grads

    def _groups(self) -> dict[nn.Parameter, int]:
        return {p: i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}

    def _forget(self, units: Iterable[Unit]) -> None:
        """Drop the stored state of ``units``."""
        for unit in units:
            forget(self._store, unit, [k for k in state_kinds_of(self._store, unit) if suffix_of(k) == self.suffix])

    def _require_known(self, params: Iterable[Any]) -> None:
        for entry in params:
            param = entry[1] if isinstance(entry, tuple) else entry
            if param not in self._places:
                raise ConfigurationError(
                    f"optimizer {type(self.optimizer).__name__} is given a parameter of shape {tuple(param.shape)} "
                    "that was not in the LightningModule when the Trainer set it up; register it there, in __init__ or "
                    "configure_model, and freeze it (requires_grad=False) until it is wanted"
                )

    # -- state ---------------------------------------------------------------------------------------------------

    def scalars(self) -> dict[str, dict[str, Any]]:
        """State that is not of the parameter's shape, by parameter name."""
        self._finish_edits()
        return {self._name(p): dict(s) for p, s in self._scalars.items() if s}

    def initialised(self) -> dict[str, set[str]]:
        """Kinds of full-shaped states that each parameter has, by parameter name."""
        self._finish_edits()
        return {self._name(p): set(kinds) for p, kinds in self._initialised.items() if kinds}

    def groups_by_name(self) -> list[dict[str, Any]]:
        """Parameter groups with names in place of parameters."""
        return [{**group, "params": [self._name(p) for p in group["params"]]} for group in self.optimizer.param_groups]

    def shapes_by_name(self) -> list[dict[str, tuple[int, ...]]]:
        """Name and shape of the parameters, group by group."""
        return [{self._name(p): tuple(p.shape) for p in group["params"]} for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with state tensors mapped from the store."""
        for hook in self._hooks("state_dict_pre"):
            hook(self.optimizer)
        state_dict = self._dump()
        for hook in self._hooks("state_dict_post"):
            found = hook(self.optimizer, state_dict)
            state_dict = state_dict if found is None else found
        return state_dict

    @property
    def is_hooked(self) -> bool:
        """Whether hooks of the user may change what `state_dict` returns."""
        return bool(self._hooks("state_dict_post"))

    def _hooks(self, kind: str) -> list[Callable[..., Any]]:
        return list(getattr(self.optimizer, f"_optimizer_{kind}_hooks").values())

    def _dump(self) -> dict[str, Any]:
        self._finish_edits()
        snapshot = cache(self._snapshot)
        states = (self._state_of(param, snapshot) for param in self.params())
        numbers = count()
        groups = [{**g, "params": [next(numbers) for _ in g["params"]]} for g in self.optimizer.param_groups]
        return {"state": {n: state for n, state in enumerate(states) if state}, "param_groups": groups}

    def _state_of(self, param: nn.Parameter, show: Callable[[Unit, str], tuple[Tensor, ...]]) -> dict[str, Any]:
        """The state of ``param`` by name; ``show`` gives the tensors of a kind of a unit."""
        unit, index = self._places[param]
        kinds = sorted(self._initialised.get(param, ()))
        full = {kind: show(unit, kind + self.suffix)[index] for kind in kinds}
        return {**self._scalars.get(param, {}), **full}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; tensors are streamed into the store unit by unit.

        Raises:
            OptimizerStateError: If the state does not fit the optimizer.
        """
        self.drain()
        state_dict = dict(state_dict)
        for hook in self._hooks("load_state_dict_pre"):
            found = hook(self.optimizer, state_dict)
            state_dict = state_dict if found is None else found
        saved_groups = deepcopy(state_dict["param_groups"])  # a scheduler may write to tensors in it
        groups = self.optimizer.param_groups
        sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, saved_groups))
        if sizes != saved_sizes:
            raise OptimizerStateError(
                f"the optimizer state is for groups of {saved_sizes} parameters, {type(self.optimizer).__name__} has "
                f"groups of {sizes}; configure_optimizers must be as it was when the checkpoint was saved"
            )
        loaded: dict[nn.Parameter, dict[str, Any]] = {}
        for group, saved in zip(groups, saved_groups, strict=True):
            for param, number in zip(group["params"], saved["params"], strict=True):
                if number in state_dict["state"]:
                    loaded[param] = dict(state_dict["state"][number])
        loaded = self._complete(loaded, saved_groups)
        self._view.clear_shown()
        self.optimizer.state = self._view  # type: ignore[assignment]
        self._take(loaded)
        for hook in self._hooks("load_state_dict_post"):
            hook(self.optimizer)

    def _complete(
        self, loaded: dict[nn.Parameter, dict[str, Any]], saved_groups: Iterable[dict[str, Any]]
    ) -> dict[nn.Parameter, dict[str, Any]]:
        """Put what was saved in the groups' place, and let the class add what older versions of it did not save."""
        optimizer = self.optimizer
        wanted = [[key for key in optimizer.defaults if key in group] for group in optimizer.param_groups]
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
            own = {key: group[key] for key in group if key in ("params", "param_names")}
            if saved.keys() == {"params"}:  # an import that begins with fresh state: options are the user's
                continue
            group.clear()
            group.update({**own, **saved, "params": own["params"]})
        try:
            optimizer.__setstate__({"state": defaultdict(dict, loaded), "param_groups": optimizer.param_groups})
        except KeyError as error:
            raise self._is_of_another_class(error.args[0]) from error
        for keys, group in zip(wanted, optimizer.param_groups, strict=True):
            for key in keys:
                if key not in group:
                    raise self._is_of_another_class(key)
        return {param: optimizer.state[param] for param in loaded}

    def _is_of_another_class(self, key: object) -> OptimizerStateError:
        return OptimizerStateError(
            f"the optimizer state is of another class than {type(self.optimizer).__name__}, or of another version of "
            f"it: it has no {key!r}. Let configure_optimizers make what the checkpoint was saved with, or begin with "
            "the weights alone (save_weights_only, or lightning-ssd import --weights-only)"
        )

    def _take(self, loaded: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        with self._store.writable():
            self._replace(loaded)

    def _replace(self, loaded: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        self._initialised.clear()
        self._scalars.clear()
        kinds_of = [self.rule.kinds(group) for group in self.optimizer.param_groups]
        groups = self._groups()
        for param, values in loaded.items():
            self._require_shapes(param, values, kinds_of[groups[param]])
            dtype = None if self.rule.is_elementwise else self._dtype(param)
            full = {k for k, v in values.items() if is_full(k, v, param.shape, kinds_of[groups[param]], dtype)}
            self._initialised[param] = full
            self._scalars[param] = {k: v for k, v in values.items() if k not in full}
        for unit in list(self._units()):
            kinds = {kind for p in unit.params for kind in self._initialised.get(p, ())}
            there = [kind for kind in state_kinds_of(self._store, unit) if suffix_of(kind) == self.suffix]
            for kind in sorted(kinds | {kind.removesuffix(self.suffix) for kind in there}):
                self._take_kind(unit, kind, loaded)

    def _require_shapes(self, param: nn.Parameter, values: Mapping[str, Any], kinds: Iterable[str]) -> None:
        """A moment of another shape than its parameter's belongs to another one; a class of its own may keep any."""
        for kind in kinds if self.rule.is_elementwise else ():
            value = values.get(kind)
            if isinstance(value, Tensor) and value.shape != param.shape:
                raise CheckpointError(
                    f"state {kind!r} of {self._name(param)!r} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(param.shape)}; the optimizer's parameters are in another order than when it was saved"
                )

    def _take_kind(self, unit: Unit, kind: str, loaded: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        stored, wanted = kind + self.suffix, dtype_of(unit.state_dtype)
        mine = set(self.params())
        # Another optimizer may own some of the unit's parameters: their state stays.
        before = tensors_of(self._store, unit, stored) or (None,) * len(unit.params)
        tensors: list[Tensor | None] = []
        for name, param, old in zip(unit.names, unit.params, before, strict=True):
            # One parameter's state of this name may have another shape; then it is not in the file.
            is_full_here = kind in self._initialised.get(param, ())
            tensor = (loaded.get(param, {}).get(kind) if is_full_here else None) if param in mine else old
            if tensor is not None and tensor.dtype != wanted and tensor.dtype.itemsize > wanted.itemsize:
                raise CheckpointError(
                    f"state {kind!r} of {name!r} is {tensor.dtype}, the run keeps {wanted} and would round it: resume "
                    "with the precision and master_dtype it was saved with, or begin with the weights alone"
                )
            tensors.append(tensor)
        put(self._store, unit, stored, tensors.__getitem__)

    def params_with_state(self) -> list[nn.Parameter]:
        """Parameters that have any state, in the order of the groups."""
        self.drain()
        return list(filter(self.has_state, self.params()))

    def has_state(self, param: nn.Parameter) -> bool:
        """Whether ``param`` has any state."""
        return bool(self._scalars.get(param) or self._initialised.get(param))

    def stored_state(self, param: nn.Parameter) -> dict[str, Any]:
        """The state of ``param`` by name; full-shaped tensors are mapped by the view."""
        self.drain()
        return self._state_of(param, self._view.map) if param in self._places else {}

    def _finish_edits(self) -> None:
        self.drain()
        self._take_edits()

    def _take_edits(self) -> None:
        """What the user did to ``optimizer.state`` is in the store."""
        given: Any = vars(self.optimizer).get("state", {})
        if given is not self._view:
            self.drain()
            self.optimizer.state = self._view  # type: ignore[assignment]
            self._view.clear_shown()
            self._require_known(given)
            self._take({param: state for param, state in given.items() if param in self._groups()})
        if not self._view.is_looked_at:
            return
        self.drain()
        changed, written = self._view.changes()
        if changed or written:
            known = {kind for group in self.optimizer.param_groups for kind in self.rule.kinds(group)}
            for param, state in changed.items():
                full = {k for k, v in state.items() if is_full(k, v, param.shape, known, self._dtype(param))}
                self._initialised[param] = full
                self._scalars[param] = {k: v for k, v in state.items() if k not in full}
                unit, _ = self._places[param]
                written |= {(unit.name, kind + self.suffix) for kind in full}
            shown = {param: self._view[param] for param in self.params_with_state()}
            units = {unit.name: unit for unit in self._units()}
            with self._store.writable():
                for name, kind in sorted(written):
                    self._take_kind(units[name], kind.removesuffix(self.suffix), shown)
        self._view.clear_shown()

    def _snapshot(self, unit: Unit, kind: str) -> tuple[Tensor, ...]:
        found = tensors_of(self._store, unit, kind)
        if found is None:
            raise StoreError(
                f"the state of {type(self.optimizer).__name__} is gone: its run is over and another one has begun"
            )
        return found

    def _dtype(self, param: nn.Parameter) -> torch.dtype:
        unit, _ = self._places[param]
        return dtype_of(unit.state_dtype)

    def _name(self, param: nn.Parameter) -> str:
        unit, index = self._places[param]
        return unit.names[index]
