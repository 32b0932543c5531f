"""Cutting a model into units: parameters that move together, and the modules whose forward needs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.store.dtypes import TORCH_DTYPE

UnitPolicy = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""``"auto"``, class names of modules that become units, or ``(name, module) -> bool``."""

REST = "rest"
"""Name of the unit that holds small leftovers."""

# Modules whose forward reads parameters of their children without calling them.
_ATOMIC = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass
class UnitSpec:
    """What one unit will hold.

    Attributes:
        name: Unique; the module's name, with a suffix where a module has several units, or another unit has the name.
        names: Full parameter names; a tied parameter has its first name.
        params: The parameters, all of one dtype and all trainable or all frozen.
        modules: Modules that need the unit during their forward.
        block: The repeated block that the unit is part of, None for leftovers.
        persistent: Small leftovers: once fetched, the unit stays to the end of the step.
    """

    name: str
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    block: nn.Module | None = None
    persistent: bool = False


def partition(root: nn.Module, *, policy: UnitPolicy = "auto", min_numel: int = 1_000_000) -> list[UnitSpec]:
    """Cut ``root`` into units.

    Repeated blocks become units; other modules with at least ``min_numel`` parameters of their own become units; what
    is left is one persistent unit. A tied parameter belongs to the first module that has it.

    Args:
        root: The model.
        policy: Overrides which modules are blocks.
        min_numel: Elements from which a leftover module is a unit of its own.

    Raises:
        ConfigurationError: If a parameter cannot be managed, or a policy matches nothing.
    """
    for name, param in root.named_parameters():
        _require_manageable(name, param)
    _require_apart(dict(root.named_parameters()))
    whole = _blocks(root, policy) | {m for m in root.modules() if isinstance(m, _ATOMIC)}
    owner: dict[nn.Parameter, UnitSpec] = {}
    groups: list[_Group] = []
    rest = _Group(REST, block=None, persistent=True)
    for name, module, own in _loaders(root, whole):
        fresh = [(n, p) for n, p in own if p not in owner]
        owner |= {p: _PENDING for _, p in fresh}
        small = module not in whole and sum(p.numel() for _, p in fresh) < max(min_numel, 1)
        group = rest if small else _Group(name, block=module if module in whole else None)
        group.members += [(n, p, module) for n, p in fresh]
        if fresh and not small:
            groups.append(group)
    specs = [spec for group in [*groups, rest] for spec in group.specs()]
    _name_apart(specs)
    owner = {p: spec for spec in specs for p in spec.params}
    _attach_users(root, owner, whole)
    return specs


_PENDING = UnitSpec("pending")


@dataclass
class _Group:
    """Parameters that one module (or, for the rest, several) loads; one unit for each dtype and trainability."""

    name: str
    block: nn.Module | None
    persistent: bool = False
    members: list[tuple[str, nn.Parameter, nn.Module]] = field(default_factory=list)

    def specs(self) -> list[UnitSpec]:
        dtypes = {p.dtype for _, p, _ in self.members}
        found: dict[str, UnitSpec] = {}
        for full_name, param, module in self.members:
            name = self.name + ("" if param.requires_grad else "+frozen")
            if len(dtypes) > 1:
                name += "+" + str(param.dtype).removeprefix("torch.")
            spec = found.setdefault(name, UnitSpec(name, block=self.block, persistent=self.persistent))
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


def _loaders(root: nn.Module, whole: set[nn.Module]) -> Iterator[tuple[str, nn.Module, list[tuple[str, nn.Parameter]]]]:
    """Modules that load parameters for their forward, each with the parameters it loads, in the order of the model."""

    def call(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, list[tuple[str, nn.Parameter]]]]:
        params = list(module.named_parameters(prefix=name, recurse=module in whole))
        if params:
            yield name or "root", module, params
        if module not in whole:
            for child_name, child in module.named_children():
                yield from call(f"{name}.{child_name}" if name else child_name, child)

    return call("", root)


def _attach_users(root: nn.Module, owner: dict[nn.Parameter, UnitSpec], whole: set[nn.Module]) -> None:
    """A module that holds a parameter of a unit which no module around it loads (a tied one) loads it itself."""

    def call(module: nn.Module, around: tuple[nn.Module, ...]) -> None:
        inside = (*around, module) if module in whole else around
        for param in module.parameters(recurse=False):
            users = owner[param].modules
            if module not in users and not any(outer in users for outer in inside):
                users.append(module)
        for child in module.children():
            call(child, inside)

    call(root, ())


def _blocks(root: nn.Module, policy: UnitPolicy) -> set[nn.Module]:
    if policy == "auto":
        return set(_repeated(root))
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


def _repeated(root: nn.Module) -> Iterator[nn.Module]:
    """Outermost children of a ModuleList or Sequential that occur there at least twice with the same parameters."""
    if isinstance(root, (nn.ModuleList, nn.Sequential)):
        forms: dict[object, list[nn.Module]] = {}
        for child in root.children():
            shapes = tuple((n, tuple(p.shape)) for n, p in child.named_parameters())
            if shapes and not isinstance(child, (nn.ModuleList, nn.Sequential)):
                forms.setdefault((type(child), shapes), []).append(child)
        alike = [m for same in forms.values() if len(same) > 1 for m in same]
        yield from alike
        rest = [child for child in root.children() if child not in set(alike)]
    else:
        rest = list(root.children())
    for child in rest:
        yield from _repeated(child)


def _require_manageable(name: str, param: nn.Parameter) -> None:
    if isinstance(param, nn.parameter.UninitializedParameter):
        raise ConfigurationError(
            f"parameter {name!r} has no shape yet (a lazy module); run one forward of the model, or give the module "
            "its sizes, before the Trainer starts"
        )
    if type(param) is not nn.Parameter:
        raise ConfigurationError(
            f"parameter {name!r} is a {type(param).__name__}, a special tensor class; strategy='ssd_offload' streams "
            "plain torch.nn.Parameter only: load the model without quantised or wrapped weights"
        )
    if param.layout != torch.strided:
        raise ConfigurationError(f"parameter {name!r} is {param.layout}; only strided (dense) parameters are streamed")
    if param.dtype not in TORCH_DTYPE.values():
        way_out = (
            "keep its real and imaginary parts in a float64 parameter and join them in forward with "
            "torch.view_as_complex, or make it complex64"
            if param.is_complex()
            else "convert it before the Trainer starts"
        )
        raise ConfigurationError(
            f"parameter {name!r} is {param.dtype}, which a safetensors file cannot hold; {way_out}"
        )
    if not param.is_contiguous():
        # Files and the memory they are read into have the order of the shape. torch adds in another order over other
        # strides, so the run would not be plain Lightning's to the bit, and the module would lose its layout.
        raise ConfigurationError(
            f"parameter {name!r} is not contiguous (shape {tuple(param.shape)}, strides {param.stride()}); "
            "strategy='ssd_offload' streams contiguous ones: before the Trainer starts, use nn.Parameter("
            "p.detach().contiguous()), or module.to(memory_format=torch.contiguous_format) for channels_last"
        )


def _require_apart(params: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that share memory: units have memory of their own, which would untie them."""
    places: dict[tuple[object, int], list[tuple[int, int, str]]] = {}
    for name, param in params.items():
        if param.numel() and not param.is_meta:
            key = (param.device, param.untyped_storage().data_ptr())
            places.setdefault(key, []).append((param.data_ptr(), param.data_ptr() + param.nbytes, name))
    for stretches in places.values():
        for (_, end, name), (begin, _, other) in itertools.pairwise(sorted(stretches)):
            if begin < end:
                raise ConfigurationError(
                    f"parameters {name!r} and {other!r} share memory (one was assigned to .data of the other); "
                    "strategy='ssd_offload' gives each its own, which would untie them: make them one parameter "
                    "(module.weight = other.weight), or copy the values (.data.copy_)"
                )
