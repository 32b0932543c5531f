"""How an optimizer's class can be run, found by trying: parameter by parameter, or only whole.

[Note: probe] Two small copies of the optimizer, on a few small parameters whose shapes are like those of the real ones,
make the same steps: one its own, one parameter by parameter as an update of a unit would. If parameters, state, groups
and attributes are equal to the bit after each step, the class treats each parameter by itself. That takes some
tenths of a second a class; real parameters are not looked at. A class that is not torch's own may begin late to look at
several parameters, or do so with large ones: it is tried for many steps on few of them, and on larger ones.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.optim.rules import TorchRule, is_full
from lightning_ssd.optim.shared import SharedOptions, same

UNKNOWN_NBYTES = 4.0
"""Bytes of state for each byte of parameters, where nothing could be tried."""


@dataclass(frozen=True)
class _Trial:
    """How a class is tried.

    Attributes:
        num_steps: A class may make a state only every few steps.
        size: Of the smallest dimension that is not 1.
        num_params: At most so many, the largest.
        dtype: None for each parameter's own.
    """

    num_steps: int = 12
    size: int = 8
    num_params: int | None = None
    dtype: torch.dtype | None = None


_FIRST = _Trial()
# What one parameter's update takes from the others may be too little to show in float32 in a few steps.
_FINE = _Trial(dtype=torch.float64)
_LONG = _Trial(num_steps=100, num_params=4)
_LARGE = _Trial(num_steps=3, size=64, num_params=6)

_MAX_GROUPS = 2  # that are alike
_MAX_ALIKE = 2  # parameters of one shape in a group
_MAX_COPY_NUMEL = 1 << 16  # of a tensor that is no state
_REPLACED = ("step", "zero_grad", "state_dict", "load_state_dict", "add_param_group")  # on the object
_NOT_COPIED = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", *_REPLACED)


@dataclass(frozen=True)
class Findings:
    """What a probe found.

    Attributes:
        kinds: Names of the states of the parameter's shape.
        why_whole: Why the class cannot be run parameter by parameter; empty if it can.
        moves: Whether a parameter changed in any step; None if that could not be tried.
        state_ratio: Bytes of state for each byte of parameters, when it is run whole.
        calls_closure: Whether its step evaluates the closure that it is given.
    """

    kinds: tuple[str, ...]
    why_whole: str
    moves: bool | None
    state_ratio: float
    calls_closure: bool = True


def probe(optimizer: Optimizer, *, keep_master: bool = False) -> Findings:
    """Try the class of ``optimizer``, with its attributes and options; [Note: probe].

    Args:
        optimizer: The user's.
        keep_master: 16-bit parameters have a float32 master, which is what is updated.
    """
    with _own_random_numbers(), torch.random.fork_rng(devices=()), torch.inference_mode(False):
        found = _try(optimizer, keep_master, _FIRST)
        is_known = type(optimizer).__module__.startswith("torch.optim.")
        for trial in (_FINE,) if is_known else (_FINE, _LONG, _LARGE):
            if found.why_whole or not found.moves:
                break
            try:
                further = _try(optimizer, keep_master, trial)
            except Exception:  # a schedule of the class's own may be at its end after so many steps
                continue
            found = found if further.moves is None else replace(found, why_whole=further.why_whole)
        return found


def _try(optimizer: Optimizer, keep_master: bool, trial: _Trial) -> Findings:
    try:
        whole, apart = (_Small(optimizer, keep_master, trial) for _ in range(2))
    except Exception as error:  # the user's class may refuse to be copied in any way
        return Findings((), f"it cannot be copied for a trial ({_text(error)})", None, UNKNOWN_NBYTES)
    return _compare(whole, apart, trial.num_steps)


def _compare(whole: _Small, apart: _Small, num_steps: int) -> Findings:
    moves, why = False, "it holds another optimizer" if whole.holds_another else ""
    by_parts = None if why else _ByParts(apart)
    try:
        for step in range(num_steps):
            before = whole.values()
            draws = whole.step(step)
            moves = moves or not same(before, whole.values())
            if not all(bool(value.isfinite().all()) for value in whole.values()):
                why = why or ("" if step else "it makes values that are not finite on small parameters")
                break  # what follows would be equal whatever it does
            if by_parts is None:
                continue
            why = "it draws random numbers" if draws else by_parts.step(step) or by_parts.difference(whole)
            by_parts = None if why else by_parts
    except Exception as error:  # the user's class may fail in any way
        if by_parts is None or not moves:
            return Findings((), why or f"its step fails on small parameters ({_text(error)})", None, UNKNOWN_NBYTES)
        raise
    kinds = () if by_parts is None else tuple(by_parts.kinds)
    return Findings(kinds, why, moves, whole.state_ratio(), whole.calls_closure)


class _Small:
    """A copy of an optimizer on small parameters."""

    def __init__(self, optimizer: Optimizer, keep_master: bool, trial: _Trial) -> None:
        small = _choose(optimizer, keep_master, trial)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        spare = nn.Parameter(torch.zeros(1))  # stands for those that are left out
        memo: dict[int, Any] = {id(p): small.get(p, spare) for p in params}
        self._copies: list[Optimizer] = []
        with _SmallCopies({tuple(p.shape): small_shape(tuple(p.shape), trial.size) for p in params}):
            self.optimizer = self._copy(optimizer, memo)
        self.params = list(small.values())
        self.holds_another = len(self._copies) > 1
        self.calls_closure = False
        chosen = set(self.params)
        for copied in self._copies:
            for group in copied.param_groups:
                group["params"][:] = [p for p in group["params"] if p in chosen]
                if not _is_positive(group.get("lr", 1)):  # a warm-up begins with nothing
                    group["lr"] = torch.full_like(group["lr"], 1e-3) if isinstance(group["lr"], Tensor) else 1e-3
            copied.param_groups[:] = [group for group in copied.param_groups if group["params"]]
            copied.state = defaultdict(dict, {k: v for k, v in copied.state.items() if k is not spare})
        for name in ("train",):  # such as schedule-free ones need
            mode = getattr(self.optimizer, name, None)
            if callable(mode):
                mode()

    def _copy(self, optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
        copied: Optimizer = object.__new__(type(optimizer))
        memo[id(optimizer)] = copied
        self._copies.append(copied)
        for key, value in vars(optimizer).items():
            if isinstance(value, nn.Module):
                raise TypeError(f"it holds the module {key!r}")
            if isinstance(value, Optimizer):
                copied.__dict__[key] = memo.get(id(value)) or self._copy(value, memo)
            elif key in _NOT_COPIED:
                if key.endswith("hooks"):
                    copied.__dict__[key] = type(value)()
            else:  # the state may be shown from the store of an earlier fit
                copied.__dict__[key] = deepcopy(dict(value) if key == "state" else value, memo)
        return copied

    def closure(self, step: int) -> Callable[[], Tensor]:
        """Makes gradients that are not zero, and depend on the values."""
        generator = torch.Generator().manual_seed(1000 + step)  # not the seed of the values
        targets = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in self.params]

        def evaluate() -> Tensor:
            with torch.enable_grad():
                for param in self.params:
                    param.grad = None
                loss = torch.stack([(p - t).square().sum() for p, t in zip(self.params, targets, strict=True)]).sum()
                torch.autograd.backward(loss)  # users count calls of `Tensor.backward`
            return loss.detach()

        return evaluate

    def step(self, number: int) -> bool:
        """A step of the class's own; whether it drew random numbers."""
        closure = self.closure(number)
        closure()  # a class for manual optimization may not call it
        states = torch.get_rng_state(), random.getstate()

        def evaluate() -> Tensor:
            self.calls_closure = True
            return closure()

        type(self.optimizer).step(self.optimizer, evaluate)  # type: ignore[arg-type]
        return not (torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate())

    def values(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [param.detach().clone() for param in self.params]

    def state_ratio(self) -> float:
        """Bytes of tensors that the optimizer holds beside parameters and gradients, for each byte of parameters."""
        seen = {t.untyped_storage().data_ptr() for p in self.params for t in (p, p.grad) if t is not None}
        held = 0
        for tensor in _tensors(list(map(vars, self._copies)), set()):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held += storage.nbytes()
        return held / max(sum(p.nbytes for p in self.params), 1)


class _ByParts:
    """The same parameters, updated one by one as the pipeline does it."""

    def __init__(self, small: _Small) -> None:
        self._small = small
        self._optimizer = small.optimizer
        self._rule = TorchRule(small.optimizer)
        self._options = SharedOptions(small.optimizer)
        self._states: list[dict[str, Tensor]] = []
        self._scalars: list[dict[str, Any]] = []
        for param in small.params:
            state = dict(small.optimizer.state.get(param, {}))
            full = {k for k, v in state.items() if is_full(k, v, param.shape, (), param.dtype)}
            self._states.append({k: state[k] for k in full})
            self._scalars.append({k: v for k, v in state.items() if k not in full})
        small.optimizer.state = defaultdict(dict)

    @property
    def kinds(self) -> list[str]:
        """Names of full-shaped states that were made."""
        return sorted({kind for states in self._states for kind in states})

    def step(self, number: int) -> str:
        """A step; why it cannot be made, or empty."""
        self._small.closure(number)()
        groups = {p: i for i, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        try:
            params = self._small.params
            grads = [param.grad for param in params if param.grad is not None]
            for param, grad, states, scalars in zip(params, grads, self._states, self._scalars, strict=True):
                options = self._options.hand_out(groups[param])
                known = dict(states)
                with torch.no_grad():
                    self._rule.update(param.detach(), grad, states, scalars, options, is_first=not states)
                states.update({kind: state.clone() for kind, state in states.items() if kind not in known})
            self._options.finish()
            self._rule.finish()
        except SSDOffloadError as error:
            return str(error).split(";")[0]
        except Exception as error:  # the user's class may fail in any way
            return f"its step fails on one parameter by itself ({_text(error)})"
        return ""

    def difference(self, whole: _Small) -> str:
        """What differs from the class's own step, or empty."""
        if not same([p.detach() for p in whole.params], [p.detach() for p in self._small.params]):
            return "one parameter's update depends on the others"
        if any(not isinstance(key, Tensor) for key in whole.optimizer.state):
            return "it keeps state that belongs to no parameter"
        for param, states, scalars in zip(whole.params, self._states, self._scalars, strict=True):
            if not same(dict(whole.optimizer.state.get(param, {})), {**scalars, **states}):
                return "one parameter's state depends on the others"
        ours, its = (_plain(vars(each.optimizer)) for each in (self._small, whole))
        keys = [key for key in {**ours, **its} if not same(ours.get(key), its.get(key))]
        return f"its {keys[0]!r} depends on more than one parameter" if keys else ""


class _SmallCopies(TorchFunctionMode):
    """Inside, a copy of a tensor of a parameter's shape is as small as the small parameter."""

    def __init__(self, shapes: Mapping[tuple[int, ...], tuple[int, ...]]) -> None:
        super().__init__()
        self._shapes = shapes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        shape = self._shapes.get(tuple(tensor.shape))
        if shape is None and tensor.numel() > _MAX_COPY_NUMEL:
            raise ValueError(f"it holds a tensor of shape {tuple(tensor.shape)}")
        cut = tensor.detach() if shape is None else tensor.detach()[tuple(slice(size) for size in shape)]
        memo[id(tensor)] = copied = cut.clone().requires_grad_(tensor.requires_grad)
        return copied


def small_shape(shape: tuple[int, ...], at_least: int = _FIRST.size) -> tuple[int, ...]:
    """A small shape whose dimensions compare as those of ``shape`` do; a dimension of 1 stays one."""
    sizes = sorted({size for size in shape if size > 1})
    small = {size: min(size, at_least * (rank + 1)) for rank, size in enumerate(sizes)}
    return tuple(small.get(size, size) for size in shape)


def _choose(optimizer: Optimizer, keep_master: bool, trial: _Trial) -> dict[nn.Parameter, nn.Parameter]:
    """Some of the parameters, each with a small one: of every shape and every kind of group."""
    generator = torch.Generator().manual_seed(0)
    chosen: dict[nn.Parameter, nn.Parameter] = {}
    num_groups: Counter[Any] = Counter()
    shapes_seen: Counter[Any] = Counter()
    for group in optimizer.param_groups:
        options = frozenset((k, type(v), bool(v)) for k, v in group.items() if isinstance(v, (bool, int, float, str)))
        num_groups[options] += 1
        num_here: Counter[tuple[int, ...]] = Counter()
        for param in group["params"]:
            shape = small_shape(tuple(param.shape), trial.size)
            num_here[shape] += 1
            shapes_seen[options, shape] += 1
            is_new = shapes_seen[options, shape] == 1
            if param.numel() and (is_new or (num_groups[options] <= _MAX_GROUPS and num_here[shape] <= _MAX_ALIKE)):
                values = torch.randn(shape, generator=generator)
                is_widened = keep_master and param.dtype in (torch.bfloat16, torch.float16)
                chosen[param] = nn.Parameter(values.to(trial.dtype or (values.dtype if is_widened else param.dtype)))
    largest_first = sorted(chosen.items(), key=lambda pair: -pair[1].numel())
    return chosen if trial.num_params is None else dict(largest_first[: trial.num_params])


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that are compared: not the parameters and their state."""
    left_out = (*_NOT_COPIED, "state", "param_groups")
    groups = [{k: v for k, v in g.items() if k != "params"} for g in attributes["param_groups"]]
    return {**{k: v for k, v in attributes.items() if k not in left_out}, "param_groups": groups}


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item, seen)


def _is_positive(lr: Any) -> bool:
    return not isinstance(lr, (int, float, Tensor)) or bool(lr > 0)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:120]}"


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
