"""Cutting a model into units: parameters that move together, and the modules whose forward needs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_ssd.cut.checks import require_streamable
from lightning_ssd.cut.groups import Cut, Group
from lightning_ssd.errors import ConfigurationError

UnitPolicy = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""``"auto"``, class names of modules that become units, or ``(name, module) -> bool``."""


@dataclass
class UnitSpec:
    """What one unit will hold.

    Attributes:
        name: Unique; the module's name, with a suffix where a module has several units, or another unit has the name.
        names: Full parameter names; a tied parameter has its first name.
        params: The parameters, all of one dtype and all trainable or all frozen.
        modules: Modules that need the unit during their forward.
        block: The block that the unit is fetched with; None for leftovers, and for parts that are fetched apart.
        persistent: Small leftovers: once fetched, the unit stays to the end of the step.
    """

    name: str
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    block: nn.Module | None = None
    persistent: bool = False


def partition(root: nn.Module, *, policy: UnitPolicy = "auto", min_numel: int = 1_000_000) -> list[UnitSpec]:
    """Cut ``root`` into units; see [Note: cut]. A tied parameter belongs to the first module that has it.

    Args:
        root: The model.
        policy: Overrides which modules are blocks; what it names inside of a block is fetched by itself.
        min_numel: Elements from which a leftover module, or neighbouring experts, are a unit of their own.

    Raises:
        ConfigurationError: If a parameter cannot be managed, or a policy matches nothing.
    """
    require_streamable(root)
    cut = Cut(root, None if policy == "auto" else _chosen(root, policy), min_numel=max(min_numel, 1))
    specs = [spec for group in cut.groups() for spec in _specs(group)]
    _name_apart(specs)
    _attach_users(root, {param: spec for spec in specs for param in spec.params}, cut.loading)
    return specs


def _specs(group: Group) -> list[UnitSpec]:
    """One unit for each dtype and trainability."""
    dtypes = {p.dtype for _, p, _ in group.members}
    found: dict[str, UnitSpec] = {}
    for full_name, param, module in group.members:
        name = group.name + ("" if param.requires_grad else "+frozen")
        if len(dtypes) > 1:
            name += "+" + str(param.dtype).removeprefix("torch.")
        spec = found.setdefault(name, UnitSpec(name, block=group.block, persistent=group.persistent))
        spec.names.append(full_name)
        spec.params.append(param)
        if module not in spec.modules:
            spec.modules.append(module)
    return list(found.values())


def _name_apart(specs: list[UnitSpec]) -> None:
    """Give each unit a name of its own: a module may be called as the rest is, or end as the name of a part does."""
    taken, seen = {spec.name for spec in specs}, set[str]()
    for spec in specs:
        if spec.name in seen:
            spec.name = next(name for i in itertools.count(2) if (name := f"{spec.name}+{i}") not in taken)
            taken.add(spec.name)
        seen.add(spec.name)


def _attach_users(root: nn.Module, owner: dict[nn.Parameter, UnitSpec], loading: set[nn.Module]) -> None:
    """A module that holds a parameter of a unit which no module around it loads (a tied one) loads it itself."""

    def call(module: nn.Module, around: tuple[nn.Module, ...]) -> None:
        inside = (*around, module) if module in loading else around
        for param in module.parameters(recurse=False):
            users = owner[param].modules
            if module not in users and not any(outer in users for outer in inside):
                users.append(module)
        for child in module.children():
            call(child, inside)

    call(root, ())


def _chosen(root: nn.Module, policy: UnitPolicy) -> set[nn.Module]:
    """The modules that ``policy`` names."""
    if callable(policy):
        found = {m for n, m in root.named_modules() if m is not root and policy(n, m)}
    else:
        names = [policy] if isinstance(policy, str) else list(policy)
        found = {m for m in root.modules() if type(m).__name__ in names}
        missing = set(names) - {type(m).__name__ for m in found}
        if missing:
            classes = sorted({type(m).__name__ for m in root.modules()})
            raise ConfigurationError(
                f"units names the class(es) {sorted(missing)}, the model has none of them; it has: {', '.join(classes)}"
            )
    return {m for m in found if any(True for _ in m.parameters())}
