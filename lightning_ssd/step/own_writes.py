"""Whether a module may write to its parameters in its forward by ``.data``, which no version tells."""

from __future__ import annotations

from torch import nn

from lightning_ssd.step.user_code import functions_used, names_in


def may_write(module: nn.Module, known: dict[type[nn.Module], bool]) -> bool:
    """Whether a forward of ``module`` or its children, or a hook on it, mentions ``.data``: it may write to parameters.

    Or code of the user's that it uses. torch's own forwards do so by operations on the parameter itself only.

    Args:
        module: What runs.
        known: Answers for classes; added to.
    """
    for inner in module.modules():
        kind = type(inner)
        if kind not in known:
            known[kind] = any("data" in names_in(function) for function in functions_used(kind, "forward"))
        hooks = (*inner._forward_pre_hooks.values(), *inner._forward_hooks.values())
        if known[kind] or any("data" in names_in(function) for function in hooks):
            return True
    return False
