"""Saved-tensor hooks that the user has set around a module.

Torch gives a saved tensor to the innermost hooks only. Those of a module that streams would be these, and what the
user's do (count, compress or offload what is saved) would not happen. So ours are put around the user's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from lightning_ssd.step.saved_views import ParameterView
from lightning_ssd.units import transforms

# A checkpoint runs its forward again, and counts what it is given. A chain of ours is known by its class.
_NOT_THE_USERS = ("lightning_ssd.step.backward", "lightning_ssd.step.recompute", "torch.utils.checkpoint")


class UsersHooks:
    """What is saved goes to the user's hooks; views of parameters in what they make of it hold no memory.

    Args:
        pack: The user's.
        unpack: The user's.
        hide: Returns what stands for a tensor that views a parameter, and any other tensor itself.
        show: Returns the tensor that a `ParameterView` stands for.
    """

    def __init__(
        self,
        pack: Callable[[Tensor], Any],
        unpack: Callable[[Any], Tensor],
        *,
        hide: Callable[[Tensor], object],
        show: Callable[[ParameterView], Tensor],
    ) -> None:
        self._pack = pack
        self._unpack = unpack
        self._hide = hide
        self._show = show

    def pack(self, tensor: Tensor) -> object:
        """What the user's hooks make of ``tensor``."""
        return tree_map_only(Tensor, self._hide, self._pack(tensor))

    def unpack(self, packed: Any) -> Tensor:
        """The tensor that the user's hooks make of what `pack` returned."""
        return self._unpack(tree_map_only(ParameterView, self._show, packed))


def around_users(
    hide: Callable[[Tensor], object], show: Callable[[ParameterView], Tensor]
) -> saved_tensors_hooks | None:
    """Hooks of ours around the innermost ones that are set now; None if those are not the user's."""
    top = transforms.top_hooks()
    if top is None or (getattr(top[0], "__module__", None) or "").startswith(_NOT_THE_USERS):
        return None
    around = saved_tensors_hooks(*top)
    if is_around_users(around):
        return around
    hooks = UsersHooks(*top, hide=hide, show=show)
    return saved_tensors_hooks(hooks.pack, hooks.unpack)


def is_around_users(hooks: saved_tensors_hooks) -> bool:
    """Whether ``hooks`` are around those of the user's."""
    return isinstance(getattr(hooks.pack_hook, "__self__", None), UsersHooks)
