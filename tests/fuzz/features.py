"""What programs do to their weights in a step and around it: each function is one habit of training code.

A function takes the module and the batch's tokens. What it notes with ``module.note`` is compared.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from lightning_ssd import gathered
from tests.fuzz.model import pairs, real

Feature = Callable[[Any, Tensor], Any]


def targets(module: Any) -> list[nn.Parameter]:
    """Two parameters that features write to."""
    found = real(module.net.each_block()[0])
    return [*found[:1], module.net.head.weight]


@torch.no_grad()
def evaluate(module: Any, ids: Tensor, net: nn.Module | None = None) -> None:
    """A forward in eval, noted."""
    net = module.net if net is None else net
    was_training = net.training
    net.eval()
    module.note("evaluated", net(ids)[0].float().sum())
    net.train(was_training)


# ------------------------------------------------------------------------------------------ before the step's forward


def eval_in_step(module: Any, ids: Tensor) -> None:
    evaluate(module, ids)


def inference_eval(module: Any, ids: Tensor) -> None:
    with torch.inference_mode():
        evaluate(module, ids)


def foreach_norm(module: Any, ids: Tensor) -> None:
    with torch.no_grad():
        module.note("foreach norms", torch.stack([norm.float() for norm in torch._foreach_norm(real(module.net))]))


def read_weights(module: Any, ids: Tensor) -> None:
    for name, param in module.net.named_parameters():
        module.note(f"sum of {name}", param.detach().sum())


def max_over_all(module: Any, ids: Tensor) -> None:
    module.note("largest", max(param.data.abs().max().item() for param in real(module)))


def deepcopied(module: Any, ids: Tensor) -> None:
    evaluate(module, ids, copy.deepcopy(module.net))


def write_start(module: Any, ids: Tensor) -> None:
    with torch.no_grad():
        for param in targets(module):
            param.mul_(0.98)


def assign_pair(module: Any, ids: Tensor) -> None:
    for a, b in pairs(module.net):
        a.data = a.data * 0.95 + b.data * 0.05


def swap_in_step(module: Any, ids: Tensor) -> None:
    params = real(module.net)
    backup = [param.data for param in params]
    for param in params:
        param.data = param.data * 0.9
    evaluate(module, ids)
    for param, old in zip(params, backup, strict=True):
        param.data = old


def snapshot_restore(module: Any, ids: Tensor) -> None:
    snapshot = {name: value.clone() for name, value in module.net.state_dict().items()}
    with torch.no_grad():
        for param in real(module.net):
            param.mul_(0.9)
    evaluate(module, ids)
    module.net.load_state_dict(snapshot)


def toggle_freeze(module: Any, ids: Tensor) -> None:
    if not module.program.frozen and not {"LoRA", "Shared"} & set(module.program.blocks):
        module.net.each_block()[0].requires_grad_(module.global_step % 2 == 0)


def func_grad_gathered(module: Any, ids: Tensor) -> None:
    with gathered(module.net):
        func_grad(module, ids)


def func_grad(module: Any, ids: Tensor) -> None:
    params = {name: param.detach() for name, param in module.net.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        logits, extra = torch.func.functional_call(module.net, values, (ids,))
        return logits.float().square().mean() + extra

    grads = torch.func.grad(loss)(params)
    module.note("functional gradients", torch.stack([grad.abs().sum().float() for grad in grads.values()]))


# ------------------------------------------------------------------------------------------------- parts of the loss


def pair_penalty(module: Any, ids: Tensor) -> Tensor:
    return sum(((a - b).square().mean() for a, b in pairs(module.net)), torch.zeros(())) * 0.01


def product_penalty(module: Any, ids: Tensor) -> Tensor:
    return sum(((a * b).mean() for a, b in pairs(module.net)), torch.zeros(())) * 0.01


def norm_penalty(module: Any, ids: Tensor) -> Tensor:
    return sum((param.norm() for param in real(module.net)), torch.zeros(())) * 1e-3


def norm_diff(module: Any, ids: Tensor) -> Tensor:
    total = torch.zeros(())
    for a, b in pairs(module.net):
        total = total + (a.norm() - b.norm()).square()
        module.note("distance", (a - b).detach().norm())
    return total * 0.01


def stacked_norms(module: Any, ids: Tensor) -> Tensor:
    return torch.stack([param.norm() for param in real(module.net)]).norm() * 0.01


def flat_penalty(module: Any, ids: Tensor) -> Tensor:
    return parameters_to_vector(real(module.net)).square().mean()


def two_forwards(module: Any, ids: Tensor) -> Tensor:
    return F.mse_loss(module.net(ids.flip(1))[0].float(), module.net(ids)[0].float().detach()) * 0.1


def input_grad(module: Any, ids: Tensor) -> Tensor:
    x = torch.randn(*ids.shape, module.program.width, requires_grad=True, dtype=module.net.head.weight.dtype)
    logits, _ = module.net.after_embedding(x)
    (grad,) = torch.autograd.grad(logits.float().square().mean(), x, create_graph=True)
    return grad.float().square().mean()


def functional_call(module: Any, ids: Tensor) -> Tensor:
    changed = {name: param * 0.99 for name, param in module.net.named_parameters()}
    logits, _ = torch.func.functional_call(module.net, changed, (ids,))
    return logits.float().square().mean() * 0.1


def frozen_critic(module: Any, ids: Tensor) -> Tensor:
    x = torch.randn(*ids.shape, module.program.width, dtype=module.net.head.weight.dtype) * 0.1
    logits, _ = module.critic.after_embedding(x + module.net.head.weight[0])
    return logits.float().square().mean() * 0.1


def memory_bank(module: Any, ids: Tensor) -> Tensor:
    logits, bank = module.logits.float(), module.bank
    module.bank = logits.detach()
    return torch.zeros(()) if bank is None or bank.shape != logits.shape else F.mse_loss(logits, bank) * 0.1


def anchors_in_configure(module: Any, ids: Tensor) -> Tensor:
    loss = torch.zeros(())
    for param, anchor in zip(real(module.net), module.anchors, strict=True):
        loss = loss + (param.float() - anchor.float()).square().sum()
    return loss * 0.01


# --------------------------------------------------------------------------------- between the forward and the backward


def write_between(module: Any, ids: Tensor) -> None:
    for param in targets(module):
        param.data.mul_(0.99)


def autograd_grad(module: Any, ids: Tensor) -> None:
    wanted = [param for param in targets(module) if param.requires_grad]
    grads = torch.autograd.grad(module.loss, wanted, retain_graph=True, allow_unused=True)
    for grad in grads:
        module.note("gradient by hand", None if grad is None else grad.float().norm())


# -------------------------------------------------------------------------------------------------------- in callbacks


@torch.no_grad()
def scale_targets(module: Any) -> None:
    for param in targets(module):
        param.mul_(0.98)


def scale_data(module: Any) -> None:
    for param in targets(module):
        param.data.mul_(0.98)


def clip_weights(module: Any) -> None:
    for param in real(module):
        param.data.clamp_(-0.5, 0.5)


@torch.no_grad()
def add_noise(module: Any) -> None:
    for param in targets(module):
        param.add_(torch.randn_like(param) * 0.01)


def read_grads(module: Any) -> None:
    for name, param in module.named_parameters():
        module.note(f"gradient of {name}", None if param.grad is None else param.grad.abs().sum())


def edit_grads(module: Any) -> None:
    for param in real(module):
        if param.grad is not None:
            param.grad.mul_(0.5)


def deepcopy_weights(module: Any) -> None:
    copied = copy.deepcopy(module.net)
    module.note("copied", torch.stack([param.detach().float().sum() for param in real(copied)]))


def save_weights(module: Any) -> None:
    file = io.BytesIO()
    torch.save(module.net.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    module.note("saved", torch.stack([v.float().sum() for v in loaded.values() if v.is_floating_point()]))


def reinit_last(module: Any) -> None:
    if module.global_step == 2:
        module.net.head.reset_parameters()


BEFORE: dict[str, Feature] = {
    **{f.__name__: f for f in (eval_in_step, inference_eval, foreach_norm, read_weights, max_over_all, write_start)},
    **{f.__name__: f for f in (assign_pair, swap_in_step, snapshot_restore, toggle_freeze, func_grad)},
    "func_grad_gathered": func_grad_gathered,
    "deepcopy": deepcopied,
}
LOSSES: dict[str, Feature] = {
    **{f.__name__: f for f in (pair_penalty, product_penalty, norm_penalty, norm_diff, stacked_norms, flat_penalty)},
    **{f.__name__: f for f in (two_forwards, input_grad, functional_call, frozen_critic, memory_bank)},
    "anchors_in_configure": anchors_in_configure,
}
BETWEEN: dict[str, Feature] = {f.__name__: f for f in (write_between, autograd_grad)}
# Name: hook of a callback, and what it does there.
CALLBACKS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "write_batch_start": ("on_train_batch_start", scale_targets),
    "write_batch_end": ("on_train_batch_end", scale_targets),
    "write_before_step": ("on_before_optimizer_step", scale_data),
    "write_before_zero_grad": ("on_before_zero_grad", scale_data),
    "write_after_backward": ("on_after_backward", scale_data),
    "clip_weights_batch_end": ("on_train_batch_end", clip_weights),
    "add_noise": ("on_train_batch_start", add_noise),
    "read_grads": ("on_after_backward", read_grads),
    "grad_norms": ("on_before_optimizer_step", read_grads),
    "edit_grads": ("on_before_optimizer_step", edit_grads),
    "deepcopy_callback": ("on_train_batch_end", deepcopy_weights),
    "save_callback": ("on_train_batch_end", save_weights),
    "reinit_last": ("on_train_batch_start", reinit_last),
}
FEATURES = (*BEFORE, *(name for name in LOSSES if name != "anchors_in_configure"), *BETWEEN, *CALLBACKS)
FEATURES += ("skip_step", "log_weights", "hook_on_blocks", "prune", "swap_validation")
