"""Finds mixtures of experts in a block, from shapes alone.

[Note: mixtures] A list of alike modules is run one after another, or a router chooses among them for each token. A
router has one output per expert: a parameter beside the list, one of whose sizes is the number of modules in the list.
The block that holds both is what is recomputed, and its experts are fetched one by one inside of it. Experts that are
fused, in parameters of three dimensions of which the first is the number of experts, cannot be taken apart: kernels
take the whole tensor, and autograd makes one gradient for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def experts_in(block: nn.Module) -> Iterator[list[nn.Module]]:
    """The experts of each mixture inside ``block``, in order; see [Note: mixtures]."""
    for module in block.modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        experts = [child for child in module.children() if any(True for _ in child.parameters())]
        if len(experts) > 1 and len(set(map(_form, experts))) == 1 and _has_router(block, len(experts), experts):
            yield experts


def fused_in(block: nn.Module) -> Iterator[nn.Module]:
    """Modules inside ``block`` whose own parameters are fused experts; see [Note: mixtures]."""
    for module in block.modules():
        counts = {param.shape[0] for param in module.parameters(recurse=False) if param.dim() == 3}
        is_mixture = len(counts) == 1 and not isinstance(module, nn.modules.conv._ConvNd)
        if module is not block and is_mixture and _has_router(block, counts.pop(), [module]):
            yield module


def _has_router(block: nn.Module, num_experts: int, experts: list[nn.Module]) -> bool:
    inside = {param for expert in experts for param in expert.parameters()}
    beside = (param for param in block.parameters() if param not in inside)
    return any(num_experts in param.shape for param in beside if param.dim() <= 2)


def _form(module: nn.Module) -> object:
    return type(module), tuple((name, tuple(param.shape)) for name, param in module.named_parameters())
