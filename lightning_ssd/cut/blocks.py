"""Finds the repeated blocks of a model from its structure alone: classes and shapes, never names or values.

[Note: blocks] A block is what a model repeats, and what it runs one after another: a layer of a transformer, a residual
block. Blocks are siblings of one class in a list (`nn.ModuleList`, `nn.ModuleDict`, `nn.Sequential`, lists in lists) or
among the attributes of a module. These rules decide what else is one, and what only looks like one:

- A sibling that consists mostly of such siblings itself is a stage, or a model in a list of models: its parts are the
  blocks. Two alike attributes (self-attention and cross-attention) do not make a stage of a block, nor do the experts
  of a mixture, see `mixtures`.
- The only module of an `nn.ModuleList` is a block too: a model of one layer, or a layer that runs many times (ALBERT).
- So is a module elsewhere that has the class of a block: the first of its kind, or the one in the middle of a UNet.
- A module without parts is a block only among siblings of the same shapes in a list, and if it has a matrix: layers of
  an MLP are blocks, norms are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from enum import Enum, auto

from torch import nn

from lightning_ssd.cut.mixtures import experts_in

_MIN_ATTRIBUTES = 3
"""Alike attributes from which a module is a stage."""


_MIN_LAYERS = 4
"""Alike modules without parts in a list from which a module is a stage: a deep MLP, one of several."""


class _Held(Enum):
    """How a module holds some of its children."""

    LIST = auto()
    SEQUENCE = auto()
    ATTRIBUTES = auto()


def find_blocks(root: nn.Module, *, min_numel: int) -> list[nn.Module]:
    """The blocks of ``root``, none inside another; see [Note: blocks].

    Args:
        root: The model.
        min_numel: Elements below which a stage is not taken apart.
    """
    search = _Search(min_numel)
    found = list(dict.fromkeys(search.blocks_below(root)))
    classes = {type(block) for block in found if has_parts(block)}
    return found + list(_others(root, classes, set(found)))


class _Search:
    def __init__(self, min_numel: int) -> None:
        self._min_numel = min_numel
        self._stages: dict[nn.Module, bool] = {}

    def blocks_below(self, module: nn.Module) -> Iterator[nn.Module]:
        """The blocks inside ``module``, which is none."""
        for children, held in _siblings(module):
            num_alike = Counter(map(_form, children))
            for child in children:
                is_only = held is _Held.LIST and has_parts(child)
                if (
                    (num_alike[_form(child)] > 1 or is_only)
                    and _can_be_block(child, held)
                    and not self._is_stage(child)
                ):
                    yield child
                else:
                    yield from self.blocks_below(child)

    def _is_stage(self, module: nn.Module) -> bool:
        """Whether ``module`` consists mostly of blocks that are smaller, embeddings apart."""
        if module not in self._stages:
            total = numel_of([module]) - numel_of(m for m in module.modules() if isinstance(m, nn.Embedding))
            parts: Iterable[nn.Module] = ()
            if has_parts(module) and total >= self._min_numel:
                experts = {inner for run in experts_in(module) for expert in run for inner in expert.modules()}
                parts = self._repeated_in(module, experts)
            self._stages[module] = 2 * numel_of(parts) > total
        return self._stages[module]

    def _repeated_in(self, module: nn.Module, experts: set[nn.Module]) -> Iterator[nn.Module]:
        """Alike modules inside ``module`` that are blocks if it is a stage."""
        for children, held in _siblings(module):
            num_alike = Counter(map(_form, children))
            for child in (child for child in children if child not in experts):
                if self._is_part(child, num_alike[_form(child)], held):
                    yield child
                else:
                    yield from self._repeated_in(child, experts)

    def _is_part(self, module: nn.Module, num_alike: int, held: _Held) -> bool:
        if has_parts(module):  # one matrix and a norm are a layer of a block
            return num_alike >= (_MIN_ATTRIBUTES if held is _Held.ATTRIBUTES else 2) and _num_matrices(module) > 1
        is_large = numel_of([module]) >= self._min_numel
        return held is not _Held.ATTRIBUTES and num_alike >= _MIN_LAYERS and is_large and _num_matrices(module) > 0


def is_list(module: nn.Module) -> bool:
    """Whether ``module`` is a list of others, which has no forward of its own."""
    return type(module) is nn.Sequential or (
        isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not has_forward(module)
    )


def has_forward(module: nn.Module) -> bool:
    """Whether ``module`` can be called."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def has_parts(module: nn.Module) -> bool:
    """Whether a child of ``module`` has parameters."""
    return any(map(_has_params, module.children()))


def numel_of(modules: Iterable[nn.Module]) -> int:
    """Elements of the parameters of ``modules``, each parameter once."""
    params = {param for module in modules for param in module.parameters()}
    return sum(param.numel() for param in params)


def _siblings(module: nn.Module) -> Iterator[tuple[list[nn.Module], _Held]]:
    """Sets of children with parameters that may repeat each other; a list in a list is a part of it."""
    if is_list(module):
        yield list(_items(module)), _Held.SEQUENCE if isinstance(module, nn.Sequential) else _Held.LIST
        return
    for child in module.children():
        if is_list(child):
            yield from _siblings(child)
    yield [child for child in module.children() if not is_list(child) and _has_params(child)], _Held.ATTRIBUTES


def _items(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if is_list(child):
            yield from _items(child)
        elif _has_params(child):
            yield child


def _form(module: nn.Module) -> object:
    """What alike siblings have in common: their class; without parts their shapes too."""
    if has_parts(module):
        return type(module)
    return type(module), tuple((name, tuple(param.shape)) for name, param in module.named_parameters())


def _can_be_block(module: nn.Module, held: _Held) -> bool:
    return has_parts(module) or (held is not _Held.ATTRIBUTES and _num_matrices(module) > 0)


def _num_matrices(module: nn.Module) -> int:
    return sum(param.dim() > 1 for param in module.parameters())


def _has_params(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _others(root: nn.Module, classes: set[type[nn.Module]], blocks: set[nn.Module]) -> Iterator[nn.Module]:
    """Outermost modules of ``classes`` that are not inside of a block, and have none inside."""
    stages = {type(m) for m in root.modules() if m not in blocks and not blocks.isdisjoint(m.modules())}
    for child in root.children():
        if child in blocks:
            continue
        if type(child) in classes - stages and _has_params(child):
            yield child
        else:
            yield from _others(child, classes, blocks)
