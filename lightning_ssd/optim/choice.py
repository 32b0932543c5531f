"""Which rule updates the parameters of an optimizer: a native one, its class on each parameter, or its class whole."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.optim.probe import UNKNOWN_NBYTES, probe
from lightning_ssd.optim.rules import NATIVE_RULES, Rule, TorchRule
from lightning_ssd.optim.whole import WholeRule


def choose_rule(optimizer: Optimizer, update: str, *, keep_master: bool) -> Rule:
    """The rule for an optimizer.

    Args:
        optimizer: The user's.
        update: ``"native"``, ``"torch"`` or ``"auto"``: native for plain Adam, AdamW and SGD, torch otherwise.
        keep_master: 16-bit parameters have a float32 master.

    Raises:
        ConfigurationError: If the optimizer cannot be run, or not natively.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ConfigurationError(
            f"optimizer {name} needs sparse gradients and cannot be streamed; use a dense one such as AdamW, or "
            "another strategy"
        )
    why_not = _why_not_native(optimizer, keep_master=keep_master)
    if update == "native" and why_not:
        raise ConfigurationError(f"update='native' cannot run {name}: {why_not}; use update='torch' or 'auto'")
    if update != "torch" and not why_not:
        return NATIVE_RULES[type(optimizer)]()
    return _rule_of_class(optimizer, keep_master=keep_master)


def _rule_of_class(optimizer: Optimizer, *, keep_master: bool) -> Rule:
    name = type(optimizer).__name__
    if _is_replaced_on_class(optimizer):  # a trial would be counted among the calls of what replaces it
        return WholeRule("its step was replaced on its class", UNKNOWN_NBYTES)
    found = probe(optimizer, keep_master=keep_master)
    if found.moves is False:
        raise ConfigurationError(
            f"optimizer {name} changed no parameter in a trial of several steps with gradients that are not zero; "
            "look at its options, or use another optimizer"
        )
    why = found.why_whole
    if _is_replaced_step(optimizer):
        why = "its step was replaced on the object"
    elif type(optimizer).state_dict is not Optimizer.state_dict:  # it saves more than state and groups
        why = "it has a state_dict of its own"
    if not why:
        return TorchRule(optimizer, found.kinds, calls_closure=found.calls_closure)
    narrow = (torch.bfloat16, torch.float16)
    if keep_master and any(p.dtype in narrow for group in optimizer.param_groups for p in group["params"]):
        raise ConfigurationError(
            f"optimizer {name} can only be run whole ({why}), and then has no float32 masters of 16-bit parameters; "
            "use precision='32-true' or 'bf16-mixed', plugins=[SSDOffloadPrecision(..., master_dtype='param')], or an "
            "optimizer that treats each parameter by itself, such as AdamW"
        )
    return WholeRule(why, found.state_ratio)


def _is_replaced_step(optimizer: Optimizer) -> bool:
    step = vars(optimizer).get("step")
    # Schedulers wrap the step to count calls; that does not change it.
    return step is not None and not hasattr(step, "_wrapped_by_lr_sched")


def _is_replaced_on_class(optimizer: Optimizer) -> bool:
    return not inspect.isfunction(inspect.getattr_static(optimizer, "step")) and "step" not in vars(optimizer)


def _why_not_native(optimizer: Optimizer, *, keep_master: bool) -> str:
    if type(optimizer) not in NATIVE_RULES:
        *names, last = (cls.__name__ for cls in NATIVE_RULES)
        return f"only {', '.join(names)} and {last} have native kernels"
    if _is_replaced_step(optimizer):
        return "its step was replaced on the object"
    if _is_replaced_on_class(optimizer):
        return "its step was replaced on its class"
    for group in optimizer.param_groups:
        for option in ("amsgrad", "differentiable", "capturable"):
            if group.get(option):
                return f"it has {option}=True"
        values = [group.get("lr"), group.get("weight_decay"), group.get("eps"), *group.get("betas", ())]
        if any(isinstance(value, Tensor) for value in values):
            return "its lr or betas are tensors, with which torch rounds at other places"
        known = (torch.float32, torch.bfloat16, torch.float16) if keep_master else (torch.float32,)
        if any(p.dtype not in known for p in group["params"]):
            return f"it updates values that are not {', '.join(str(dtype) for dtype in known)}"
    return ""
