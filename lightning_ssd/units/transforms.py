"""Transforms of torch.func, dispatch modes, and saved-tensor hooks, which transforms do not run under.

A tensor that is made under a transform (``grad``, ``vmap``, ``jvp``) is wrapped, and is invalid after it. So tensors
that live longer, such as the data of a parameter, are made outside (`suspended`). No dispatch mode may see how they
are made either: a selective checkpoint counts the operators of a forward, and a second run may fetch when the first did
not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.graph import saved_tensors_hooks

from lightning_ssd.errors import ResidencyError


def are_active() -> bool:
    """Whether a transform runs in this thread."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def are_duals_made() -> bool:
    """Whether tensors may carry tangents (torch.autograd.forward_ad), which do not last until backward."""
    return torch.autograd.forward_ad._current_level >= 0


def suspended() -> AbstractContextManager[object]:
    """Inside, no transform is active, and no dispatch mode sees an operator."""
    is_watched = torch._C._len_torch_dispatch_stack() > 0
    if not (is_watched or are_active()):
        return nullcontext()
    stack = ExitStack()
    if is_watched:
        stack.enter_context(torch._C._DisableTorchDispatch())
    if are_active():
        stack.enter_context(temporarily_clear_interpreter_stack())
    return stack


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that transforms have wrapped as ``tensor``; ``tensor`` itself if none has."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def require_no_transform(error: BaseException) -> None:
    """Raise an error that says what to do if ``error`` is torch.func's refusal to run in a step.

    Raises:
        ResidencyError: It is that refusal.
    """
    if isinstance(error, RuntimeError) and "support saved tensor hooks" in str(error):
        raise ResidencyError(
            "torch.func (grad, vjp, jacrev, hessian) does not run in a step of a model that is streamed, where what is "
            "saved of parameters is watched: call it inside `with lightning_ssd.gathered(module):`, with the module "
            f"that it runs ({error})"
        ) from error


class StepHooks:
    """Saved-tensor hooks of a step, for tensors that are saved outside the forward of modules with units.

    torch.func refuses to run while such hooks are set. So they are not set under ``gathered()``, nor, if they save no
    memory, before a parameter is used outside its module.

    Args:
        make: Makes the hooks.
    """

    def __init__(self, make: Callable[[], saved_tensors_hooks]) -> None:
        self._make = make
        self._hooks: saved_tensors_hooks | None = None
        self._is_suspended = False

    def begin(self) -> None:
        """Set them, unless other hooks are set, of a module or the user's, which then handle what is saved."""
        if self._hooks is None and not self._is_suspended and _may_set() and top_hooks() is None:
            hooks = self._make()
            hooks.__enter__()
            self._hooks = hooks

    def end(self) -> None:
        """Remove them."""
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, they are not set."""
        top = top_hooks()
        is_ours = self._hooks is not None and top is not None and top[0] == self._hooks.pack_hook and _may_set()
        before, self._is_suspended = self._is_suspended, True
        if is_ours:
            self.end()
        try:
            yield
        finally:
            self._is_suspended = before
            if is_ours:
                self.begin()


def _may_set() -> bool:
    """Whether hooks would stay set: autograd's engine resets them after each node, a transform at its end."""
    return not are_active() and torch._C._current_graph_task_id() == -1


def top_hooks() -> tuple[Callable[[Tensor], object], Callable[[Any], Tensor]] | None:
    """The innermost hooks that are set now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def is_on_top(pack: Callable[..., object]) -> bool:
    """Whether ``pack`` is of the innermost hooks, to which tensors that are saved now go."""
    top = top_hooks()
    return top is not None and top[0] == pack
