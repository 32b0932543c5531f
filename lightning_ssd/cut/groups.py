"""Which parameters of a model are fetched together: [Note: cut].

[Note: cut] Each block is a unit; [Note: blocks] in `blocks.py` says what is one. A part of a block is a unit of its
own, which is fetched and released while the block runs, if it is an expert of a mixture, if several blocks share it, or
if the user names both. Fused experts are a unit that is fetched with their block. A module outside of blocks is a unit
if it is large. What is left is one unit that stays in memory during a step; there is a bound to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_ssd.cut.blocks import find_blocks, has_forward, numel_of
from lightning_ssd.cut.mixtures import experts_in, fused_in

REST = "rest"
"""Name of the unit that holds small leftovers."""

MAX_REST = 4
"""The rest has at most this many times ``min_numel`` elements. What is more does not stay in memory."""

# Modules whose forward reads parameters of their children without calling them.
_ATOMIC = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass
class Group:
    """Parameters that are fetched together.

    Attributes:
        name: Of the module that has them, or of the first one.
        members: Full name of each, itself, and the module that loads it.
        block: The block that they are fetched with; None for leftovers, and for parts that are fetched apart.
        persistent: Small leftovers, which stay in memory to the end of a step.
    """

    name: str
    members: list[tuple[str, nn.Parameter, nn.Module]]
    block: nn.Module | None = None
    persistent: bool = False

    @property
    def numel(self) -> int:
        """Elements."""
        return sum(param.numel() for _, param, _ in self.members)


class Cut:
    """The cut of one model.

    Args:
        root: The model.
        chosen: The modules that the user wants to be units; None to find the blocks.
        min_numel: Elements from which a leftover module, or neighbouring experts, are a unit of their own.

    Attributes:
        loading: Modules that load all their parameters, also those of their children; known after `groups`.
    """

    def __init__(self, root: nn.Module, chosen: set[nn.Module] | None, *, min_numel: int) -> None:
        self._root = root
        self._min_numel = min_numel
        self._names = {module: name or "root" for name, module in root.named_modules()}
        self._param_names = {param: name for name, param in root.named_parameters()}
        self._chosen = chosen
        found = set(find_blocks(root, min_numel=min_numel)) if self._chosen is None else self._chosen
        self._blocks = set(_outermost(root, found | {m for m in root.modules() if isinstance(m, _ATOMIC)}))
        self._shared = _shared_by(self._blocks)
        self._taken: set[nn.Parameter] = set()
        self.loading: set[nn.Module] = set()

    def groups(self) -> list[Group]:
        """All parameters, in the order of the model; the leftovers come last."""
        large: list[Group] = []
        small: list[Group] = []
        for group, is_leftover in self._below(self._root):
            if group.members:
                (small if is_leftover and group.numel < self._min_numel else large).append(group)
        return large + self._bounded([member for group in small for member in group.members])

    def _below(self, module: nn.Module) -> Iterator[tuple[Group, bool]]:
        """The groups of ``module``, and whether each is a leftover."""
        if module in self._blocks:
            for group in self._of_block(module):
                yield group, False
            return
        yield self._take(self._names[module], module, module.parameters(recurse=False)), True
        for child in module.children():
            yield from self._below(child)

    def _of_block(self, block: nn.Module) -> list[Group]:
        parts = []
        for modules in self._parts_of(block):
            self.loading.update(modules)
            first, last = self._names[modules[0]], self._names[modules[-1]].rpartition(".")[2]
            group = Group(first if len(modules) == 1 else f"{first}-{last}", [])
            for module in modules:
                group.members += self._take(first, module, module.parameters()).members
            parts.append(group)
        for module in fused_in(block) if self._chosen is None else ():
            params = list(module.parameters(recurse=False))
            if self._is_worth_it(sum(param.numel() for param in params), block):
                parts.insert(0, self._take(self._names[module], block, params, block=block))
        own = self._take(self._names[block], block, (), block=block)
        for module in [block] if has_forward(block) else [*_called_in(block), block]:
            self.loading.add(module)
            own.members += self._take(own.name, module, module.parameters()).members
        return [own, *parts]

    def _take(
        self, name: str, module: nn.Module, params: Iterable[nn.Parameter], block: nn.Module | None = None
    ) -> Group:
        """Of ``params`` those that no group has yet, for ``module`` to load."""
        fresh = [param for param in dict.fromkeys(params) if param not in self._taken]
        self._taken.update(fresh)
        return Group(name, [(self._param_names[param], param, module) for param in fresh], block)

    def _parts_of(self, block: nn.Module) -> Iterator[list[nn.Module]]:
        """Modules inside ``block`` that are fetched together, and apart from it; what is inside of others first."""
        if self._chosen is not None:
            yield from ([m] for m in reversed(list(block.modules())) if m in self._chosen and m is not block)
            return
        for experts in experts_in(block):
            runs = list(self._runs(experts))
            if len(runs) > 1 and self._is_worth_it(numel_of(experts), block):
                yield from runs
        yield from ([m] for m in _wholly_shared(block, self._shared) if numel_of([m]) >= self._min_numel)

    def _is_worth_it(self, numel: int, block: nn.Module) -> bool:
        return numel >= self._min_numel and 2 * numel >= numel_of([block])

    def _runs(self, modules: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
        """Neighbours that are large enough together."""
        run: list[nn.Module] = []
        for module in modules:
            run.append(module)
            if numel_of(run) >= self._min_numel:
                yield run
                run = []
        if run:
            yield run

    def _bounded(self, members: list[tuple[str, nn.Parameter, nn.Module]]) -> list[Group]:
        """The rest, and before it units of what is too much for it: neighbours that are large enough together."""
        groups = []
        excess = sum(param.numel() for _, param, _ in members) - MAX_REST * self._min_numel
        while excess > 0:
            run = Group(self._names[members[0][2]], [])
            while run.numel < self._min_numel:
                run.members.append(members.pop(0))
            excess -= run.numel
            groups.append(run)
        return [*groups, Group(REST, members, persistent=True)]


def _outermost(module: nn.Module, found: set[nn.Module]) -> Iterator[nn.Module]:
    """Modules of ``found`` that are not inside of others."""
    if module in found:
        yield module
        return
    for child in module.children():
        yield from _outermost(child, found)


def _called_in(module: nn.Module) -> Iterator[nn.Module]:
    """Outermost modules inside ``module``, which has no forward, that can be called."""
    for child in module.children():
        if has_forward(child):
            yield child
        else:
            yield from _called_in(child)


def _shared_by(blocks: Iterable[nn.Module]) -> set[nn.Parameter]:
    """Parameters that several of ``blocks`` have."""
    num_blocks = Counter(param for block in blocks for param in set(block.parameters()))
    return {param for param, num in num_blocks.items() if num > 1}


def _wholly_shared(module: nn.Module, shared: set[nn.Parameter]) -> Iterator[nn.Module]:
    """Outermost modules inside ``module`` that can be called, and of which every parameter is in ``shared``."""
    for child in module.children():
        params = set(child.parameters())
        if params and params <= shared and has_forward(child):
            yield child
        elif not params.isdisjoint(shared):
            yield from _wholly_shared(child, shared)
