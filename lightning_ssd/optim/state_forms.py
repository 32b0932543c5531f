"""Which form the files of each unit's state have: what the option ``state`` asks for, where it is possible."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning_ssd.codec.forms import NARROW, PLAIN, SPLIT, Form
from lightning_ssd.errors import ConfigurationError
from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.optim.rules import AdamRule
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.unit import Unit
from lightning_ssd.units.unit_state import change_form

_NARROW_NAMES = {name for name, _ in NARROW}


def choose_forms(
    store: StateStore,
    units: Sequence[Unit],
    optimizers: Sequence[OptimizerAdapter],
    wanted: str,
    in_memory: Collection[str],
) -> None:
    """Give the state of each unit that is trained the form that ``wanted`` asks for.

    Args:
        store: Where states are; those that are there are converted.
        units: The model's.
        optimizers: The adopted ones.
        wanted: The option ``state``.
        in_memory: Names of units that the plan holds in memory in part. Their files are written at the end of a run,
            so they have the form in which they are computed.

    Raises:
        ConfigurationError: A form that was asked for by name is not possible; names what is in its way.
    """
    for unit in units:
        owners = _owners(unit, optimizers)
        form, why_not = (PLAIN, "") if not owners else _form(unit, owners, wanted, is_in_memory=unit.name in in_memory)
        if why_not and wanted != "auto":
            raise ConfigurationError(
                f"state={wanted!r} cannot keep the state of {unit.label}: {why_not}; use state='auto' or 'fp32'"
            )
        change_form(store, unit, form)


def keep_possible_forms(store: StateStore, units: Sequence[Unit], optimizers: Sequence[OptimizerAdapter]) -> None:
    """Convert what optimizers that were adopted meanwhile cannot update."""
    for unit in units:
        if not unit.form.is_plain and _why_no_kernel(_owners(unit, optimizers)):
            change_form(store, unit, PLAIN)


def _form(unit: Unit, owners: Sequence[OptimizerAdapter], wanted: str, *, is_in_memory: bool) -> tuple[Form, str]:
    """The form for ``unit``, and why it is not the one that is wanted; that is empty if it is."""
    if wanted == "fp32":
        return PLAIN, ""
    can_halve = unit.has_master and unit.layout.dtype == "BF16"
    why_not = _why_no_kernel(owners)
    if not why_not and wanted not in _NARROW_NAMES and not can_halve:
        why_not = "it needs bfloat16 parameters with a float32 master, as precision='bf16-true' gives them"
    if why_not:
        return PLAIN, why_not
    has_halves = can_halve and not is_in_memory
    if wanted in _NARROW_NAMES:
        return NARROW[wanted, has_halves], ""
    return SPLIT if has_halves else PLAIN, ""


def _owners(unit: Unit, optimizers: Sequence[OptimizerAdapter]) -> list[OptimizerAdapter]:
    mine = set(unit.params)
    return [adopted for adopted in optimizers if not mine.isdisjoint(adopted.params())]


def _why_no_kernel(owners: Sequence[OptimizerAdapter]) -> str:
    """Why what ``owners`` update cannot have another form than plain values; empty if it can."""
    for adopted in owners:
        if not isinstance(adopted.rule, AdamRule):
            return f"{type(adopted.optimizer).__name__} is not run by the kernel of Adam, which alone keeps this form"
        if adopted.suffix:
            return "two optimizers update it, and the form is that of one"
    return ""
