"""What an update does to the state of one parameter: fused native rules, or the user's own optimizer class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_ssd.codec.forms import Form, Piece
from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.kernels import api as kernels
from lightning_ssd.kernels.options import AdamOptions, SGDOptions
from lightning_ssd.optim.shared import same

Options = Mapping[str, Any]
"""Hyper-parameters of a parameter group, captured at the step."""


class Rule:
    """Arithmetic of an update.

    Attributes:
        is_elementwise: It may be applied to any piece of a parameter by itself.
        has_kernel: It is a kernel of `kernels.api`; else it is torch's operations.
        calls_closure: The optimizer's step evaluates the closure that it is given.
    """

    is_elementwise: ClassVar[bool]
    has_kernel: ClassVar[bool] = False
    calls_closure = True

    def kinds(self, options: Options) -> tuple[str, ...]:
        """Names of the states of the parameter's shape, as ``torch.optim`` names them."""
        return ()

    def begin(self, scalars: dict[str, Any], options: Options) -> None:
        """One update of a parameter starts: an elementwise rule counts the step here."""

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
            param: The values, float32 where they are a master; updated in place. Flat for an elementwise rule, else of
                the parameter's shape.
            grad: Gradient of the same shape; not changed.
            states: By kind, of the same shape; updated in place. A rule that is not elementwise may add kinds.
            scalars: Everything else that belongs to the parameter, such as ``step``. An elementwise rule reads what
                `begin` left and does not change it.
            options: Hyper-parameters. A rule that is not elementwise may change them, as its class does.
            is_first: The parameter was never updated: an elementwise rule finds zeros in ``states``.
            out: Receives the updated values in its own dtype in the same pass; elementwise rules only.
        """
        raise NotImplementedError(f"{type(self).__name__} does not update parameters one by one")

    def update_encoded(self, form: Form, piece: Piece, scalars: dict[str, Any], options: Options) -> None:
        """Update a piece of one parameter whose master and states have another form than plain values.

        Args:
            form: Which.
            piece: The piece.
            scalars: As of `update`.
            options: As of `update`.
        """
        raise NotImplementedError(f"{type(self).__name__} updates plain values only")


class AdamRule(Rule):
    """`torch.optim.Adam` and `AdamW` by the fused kernel.

    Args:
        decoupled: Weight decay is that of AdamW (arXiv 1711.05101), not a part of the gradient.
    """

    is_elementwise = True
    has_kernel = True

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
        """See `Rule.update`."""
        settings = self._settings(scalars, options)
        kernels.adam_(param, grad, states["exp_avg"], states["exp_avg_sq"], settings, out=out)

    def update_encoded(self, form: Form, piece: Piece, scalars: dict[str, Any], options: Options) -> None:
        """See `Rule.update_encoded`."""
        form.adam_(piece, self._settings(scalars, options))

    def _settings(self, scalars: dict[str, Any], options: Options) -> AdamOptions:
        return AdamOptions(
            step=int(scalars["step"]),
            lr=float(options["lr"]),
            betas=(float(options["betas"][0]), float(options["betas"][1])),
            eps=float(options["eps"]),
            weight_decay=float(options["weight_decay"]),
            decoupled=self._decoupled or bool(options.get("decoupled_weight_decay", False)),
            maximize=bool(options["maximize"]),
        )


class SGDRule(Rule):
    """`torch.optim.SGD` by the fused kernel."""

    is_elementwise = True
    has_kernel = True

    def kinds(self, options: Options) -> tuple[str, ...]:
        """See `Rule.kinds`."""
        return ("momentum_buffer",) if options["momentum"] else ()

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
        """See `Rule.update`."""
        kernels.sgd_(
            param,
            grad,
            states.get("momentum_buffer"),
            SGDOptions(
                lr=float(options["lr"]),
                momentum_factor=float(options["momentum"]),
                dampening=float(options["dampening"]),
                nesterov=bool(options["nesterov"]),
                weight_decay=float(options["weight_decay"]),
                first_step=is_first,
                maximize=bool(options["maximize"]),
            ),
            out=out,
        )


NATIVE_RULES: dict[type[Optimizer], Callable[[], Rule]] = {
    Adam: partial(AdamRule, decoupled=False),
    AdamW: partial(AdamRule, decoupled=True),
    SGD: SGDRule,
}
"""Classes that have a fused rule. `choose_rule` picks from here; each entry is tested against its class."""


class TorchRule(Rule):
    """The user's own optimizer, run on one parameter at a time: bit-equal to plain torch for any per-parameter class.

    Args:
        optimizer: The user's; its class and its attributes serve, its parameters and state do not.
        kinds: Names of states of the parameter's shape that it is known to make.
        calls_closure: Its step evaluates the closure that it is given.
    """

    is_elementwise = False
    _OWN: ClassVar[frozenset[str]] = frozenset(
        {"step", "zero_grad", "state_dict", "load_state_dict", "add_param_group", "param_groups", "state"}
    )

    def __init__(self, optimizer: Optimizer, kinds: Collection[str] = (), *, calls_closure: bool = True) -> None:
        self._optimizer = optimizer
        self._kinds = tuple(kinds)
        self.calls_closure = calls_closure
        self._left: list[dict[str, Any]] = []  # attributes that updates of this step set, one entry an update

    def kinds(self, options: Options) -> tuple[str, ...]:
        """See `Rule.kinds`; a class may make further ones later."""
        return self._kinds

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
        """See `Rule.update`."""
        shadow = torch.nn.Parameter(param, requires_grad=True)
        shadow.grad = grad
        optimizer = self._run(shadow, {**scalars, **states}, options)
        if shadow.data_ptr() != param.data_ptr():
            param.copy_(shadow.detach())
        found = optimizer.state.get(shadow, {})
        for key, value in found.items():
            if is_full(key, value, param.shape, self._kinds, param.dtype):
                if key not in states:
                    states[key] = value
                elif states[key].data_ptr() != value.data_ptr():
                    states[key].copy_(value)
            else:
                scalars[key] = value
        for key in scalars.keys() - found.keys():
            del scalars[key]

    def idle(self, options: Options) -> None:
        """Run a step for a group whose parameters have no gradients: the class may count it all the same."""
        self._run(torch.nn.Parameter(torch.zeros(1)), {}, options)

    def clear(self) -> None:
        """A step begins, or one that failed is given up."""
        self._left.clear()

    def finish(self) -> None:
        """The step is over: set the attributes that the class changed, once.

        Raises:
            SSDOffloadError: One parameter's update left another value than another's.
        """
        for left in self._left:
            for key in {**self._left[0], **left}:
                if not same(self._left[0].get(key), left.get(key)):
                    raise SSDOffloadError(
                        f"{type(self._optimizer).__name__}.{key} has another value after the update of one parameter "
                        "than after that of another: it does not treat each parameter by itself as it did when it was "
                        "tried at setup; use another optimizer, or another strategy"
                    )
        if self._left:
            vars(self._optimizer).update(self._left[0])
        self.clear()

    def _run(self, param: torch.nn.Parameter, state: dict[str, Any], options: Options) -> Optimizer:
        optimizer = self._shadow(param, state, options)
        before = dict(vars(optimizer))
        step = type(self._optimizer).step
        # Hooks fire once for the user's step, not once for each parameter.
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)  # type: ignore[attr-defined]
        after = {k: v for k, v in vars(optimizer).items() if k not in self._OWN}
        self._left.append({k: v for k, v in after.items() if k not in before or v is not before[k]})
        if isinstance(options, dict):  # a class may count in its group
            group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
            options.clear()
            options.update(group)
        return optimizer

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


def is_full(key: str, value: Any, shape: torch.Size, kinds: Collection[str], dtype: torch.dtype | None = None) -> bool:
    """Whether a state of a parameter of ``shape`` goes to a file: it has the same shape, and is not a step count.

    A parameter without dimensions has the shape of a step count; there only the names in ``kinds`` are states. Files
    have one ``dtype``: a state of another dtype goes to no file, unless its name is in ``kinds``.
    """
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        return False
    if dtype is not None and value.dtype != dtype and key not in kinds:
        return False
    return value.dim() > 0 or key in kinds
