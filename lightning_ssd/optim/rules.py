"""What an update does to the state of one parameter: fused native rules, or the user's own optimizer class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.kernels import api as kernels

Options = Mapping[str, Any]
"""Hyper-parameters of a parameter group, captured at the step."""


class Rule(Protocol):
    """Arithmetic of an update.

    Attributes:
        is_elementwise: It may be applied to any piece of a parameter by itself.
    """

    is_elementwise: bool

    def kinds(self, options: Options) -> tuple[str, ...]:
        """Names of the states of the parameter's shape, as ``torch.optim`` names them."""
        ...

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        states: dict[str, Tensor],
        scalars: dict[str, Any],
        options: Options,
        *,
        is_first: bool,
        out: Tensor | None = None,
    ) -> None:
        """Update one parameter, or an elementwise rule a piece of it.

        Args:
            param: The master, updated in place.
            grad: Gradient of the same shape; not changed.
            states: By kind, of the same shape; updated in place. A rule that is not elementwise may add kinds.
            scalars: Everything else that belongs to the parameter, such as ``step``. An elementwise rule reads the
                values after `begin` and leaves them.
            options: Hyper-parameters. A rule that is not elementwise may change them, as its class does.
            is_first: The parameter was never updated: an elementwise rule finds zeros in ``states``.
            out: Receives the updated values in its own dtype in the same pass; elementwise rules only.
        """
        ...

    def begin(self, scalars: dict[str, Any], options: Options) -> None:
        """One update of a parameter starts: an elementwise rule counts the step."""
        ...


class AdamRule:
    """`torch.optim.Adam` and `AdamW` by the fused kernel."""

    is_elementwise = True

    def __init__(self, *, decoupled: bool) -> None:
        self._decoupled = decoupled

    def kinds(self, options: Options) -> tuple[str, ...]:
        """See `Rule.kinds`."""
        return ("exp_avg", "exp_avg_sq")

    def begin(self, scalars: dict[str, Any], options: Options) -> None:
        """See `Rule.begin`."""
        scalars["step"] = torch.tensor(float(scalars.get("step", 0.0)) + 1)  # as torch keeps it

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        states: dict[str, Tensor],
        scalars: dict[str, Any],
        options: Options,
        *,
        is_first: bool,
        out: Tensor | None = None,
    ) -> None:
        """See `Rule.update`; all tensors flat."""
        kernels.adam_(
            param,
            grad,
            states["exp_avg"],
            states["exp_avg_sq"],
            step=int(scalars["step"]),
            lr=float(options["lr"]),
            betas=(float(options["betas"][0]), float(options["betas"][1])),
            eps=float(options["eps"]),
            weight_decay=float(options["weight_decay"]),
            decoupled=self._decoupled or bool(options.get("decoupled_weight_decay", False)),
            maximize=bool(options["maximize"]),
            out=out,
        )


class SGDRule:
    """`torch.optim.SGD` by the fused kernel."""

    is_elementwise = True

    def kinds(self, options: Options) -> tuple[str, ...]:
        """See `Rule.kinds`."""
        return ("momentum_buffer",) if options["momentum"] else ()

    def begin(self, scalars: dict[str, Any], options: Options) -> None:
        """See `Rule.begin`; torch keeps nothing for SGD but the momentum buffer."""

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        states: dict[str, Tensor],
        scalars: dict[str, Any],
        options: Options,
        *,
        is_first: bool,
        out: Tensor | None = None,
    ) -> None:
        """See `Rule.update`; all tensors flat."""
        kernels.sgd_(
            param,
            grad,
            states.get("momentum_buffer"),
            lr=float(options["lr"]),
            momentum_factor=float(options["momentum"]),
            dampening=float(options["dampening"]),
            nesterov=bool(options["nesterov"]),
            weight_decay=float(options["weight_decay"]),
            maximize=bool(options["maximize"]),
            first_step=is_first,
            out=out,
        )


class TorchRule:
    """The user's own optimizer, run on one parameter at a time: bit-equal to plain torch for any per-parameter class.

    Args:
        optimizer: The user's; its class and its attributes serve, its parameters and state do not.
    """

    is_elementwise = False
    _OWN: ClassVar[frozenset[str]] = frozenset({"step", "state_dict", "load_state_dict", "param_groups", "state"})

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._kinds: dict[frozenset[tuple[str, bool]], tuple[str, ...]] = {}  # by which options are set

    def kinds(self, options: Options) -> tuple[str, ...]:
        """See `Rule.kinds`; found once, by updating tiny parameters of as many dimensions as the real ones have."""
        key = frozenset((k, bool(v)) for k, v in options.items() if isinstance(v, (bool, int, float)))
        if key not in self._kinds:
            dims = {max(1, p.dim()) for group in self._optimizer.param_groups for p in group["params"]}
            states: dict[str, Tensor] = {}
            with torch.random.fork_rng(devices=()):
                for dim in sorted(dims):
                    zeros, found = torch.zeros((2,) * dim), dict[str, Tensor]()
                    self.update(zeros, torch.zeros_like(zeros), found, {}, dict(options), is_first=True)
                    states |= found
            self._kinds[key] = tuple(states)
        return self._kinds[key]

    def begin(self, scalars: dict[str, Any], options: Options) -> None:
        """See `Rule.begin`; the class itself counts."""

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        states: dict[str, Tensor],
        scalars: dict[str, Any],
        options: Options,
        *,
        is_first: bool,
        out: Tensor | None = None,
    ) -> None:
        """See `Rule.update`; shaped tensors."""
        shadow = torch.nn.Parameter(param, requires_grad=True)
        shadow.grad = grad
        optimizer = self._shadow(shadow, {**scalars, **states}, options)
        step = type(self._optimizer).step
        # Hooks fire once for the user's step, not once for each parameter.
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)  # type: ignore[attr-defined]
        if shadow.data_ptr() != param.data_ptr():
            param.copy_(shadow.detach())
        for key, value in optimizer.state[shadow].items():
            if is_full(key, value, param.shape, {kind for kinds in self._kinds.values() for kind in kinds}):
                if key not in states:
                    states[key] = value
                elif states[key].data_ptr() != value.data_ptr():
                    states[key].copy_(value)
            else:
                scalars[key] = value
        if isinstance(options, dict):  # a class may count in its group
            options.update({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})

    def _shadow(self, param: torch.nn.Parameter, state: dict[str, Any], options: Options) -> Optimizer:
        shadow: Optimizer = object.__new__(type(self._optimizer))
        shadow.__dict__.update({k: v for k, v in vars(self._optimizer).items() if k not in self._OWN})
        shadow._optimizer_step_pre_hooks = type(self._optimizer._optimizer_step_pre_hooks)()
        shadow._optimizer_step_post_hooks = type(self._optimizer._optimizer_step_post_hooks)()
        shadow.param_groups = [{**options, "params": [param]}]
        shadow.state = defaultdict(dict)
        if state:
            shadow.state[param] = state
        return shadow


def is_full(key: str, value: Any, shape: torch.Size, kinds: Collection[str]) -> bool:
    """Whether a state of a parameter of ``shape`` is kept in files: it has that shape too, and is no mere count.

    A parameter without dimensions looks like its step count; there the name, one of ``kinds``, tells.
    """
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        return False
    return value.dim() > 0 or key in kinds


def choose_rule(optimizer: Optimizer, update: str, *, keep_master: bool) -> Rule:
    """The rule for an optimizer.

    Args:
        optimizer: The user's.
        keep_master: 16-bit parameters have a float32 master.
        update: ``"native"``, ``"torch"`` or ``"auto"``: native for plain Adam, AdamW and SGD, torch otherwise.

    Raises:
        ConfigurationError: If the optimizer cannot be run parameter by parameter, or not natively.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise ConfigurationError(
            f"optimizer {name} needs all parameters in memory at once (or sparse gradients) and cannot be streamed; "
            "use a per-parameter optimizer such as AdamW, or another strategy"
        )
    why_not = _why_not_native(optimizer, keep_master=keep_master)
    if update == "native" and why_not:
        raise ConfigurationError(f"update='native' cannot run {name}: {why_not}; use update='torch' or 'auto'")
    if update == "torch" or why_not:
        return TorchRule(optimizer)
    return SGDRule() if type(optimizer) is SGD else AdamRule(decoupled=type(optimizer) is AdamW)


def _why_not_native(optimizer: Optimizer, *, keep_master: bool) -> str:
    if type(optimizer) not in (Adam, AdamW, SGD):
        return "only torch.optim.Adam, AdamW and SGD have native kernels"
    for group in optimizer.param_groups:
        for option in ("amsgrad", "differentiable", "capturable"):
            if group.get(option):
                return f"it has {option}=True"
        known = (torch.float32, torch.bfloat16, torch.float16) if keep_master else (torch.float32,)
        if any(p.dtype not in known for p in group["params"]):
            return f"it updates values that are not {', '.join(str(dtype) for dtype in known)}"
    return ""
