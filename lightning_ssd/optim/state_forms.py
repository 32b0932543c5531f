"""Which form the files of each unit's state have: what the option ``state`` asks for, where it is possible."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning_ssd.codec.forms import PLAIN, SPLIT
from lightning_ssd.errors import ConfigurationError
from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.optim.rules import AdamRule
from lightning_ssd.store.state_store import StateStore
from lightning_ssd.units.unit import Unit
from lightning_ssd.units.unit_state import change_form


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
        why_not = _why_not_split(unit, owners) if owners and wanted != "fp32" else "-"
        if why_not and owners and wanted == "split":
            raise ConfigurationError(
                f"state='split' cannot keep the state of {unit.label}: {why_not}; use state='auto' or 'fp32'"
            )
        change_form(store, unit, PLAIN if why_not or unit.name in in_memory else SPLIT)


def keep_possible_forms(store: StateStore, units: Sequence[Unit], optimizers: Sequence[OptimizerAdapter]) -> None:
    """Convert what optimizers that were adopted meanwhile cannot update."""
    for unit in units:
        if not unit.form.is_plain and _why_not_split(unit, _owners(unit, optimizers)):
            change_form(store, unit, PLAIN)


def _owners(unit: Unit, optimizers: Sequence[OptimizerAdapter]) -> list[OptimizerAdapter]:
    mine = set(unit.params)
    return [adopted for adopted in optimizers if not mine.isdisjoint(adopted.params())]


def _why_not_split(unit: Unit, owners: Sequence[OptimizerAdapter]) -> str:
    """Why the master of ``unit`` cannot be kept in two halves; empty if it can."""
    if not unit.has_master or unit.layout.dtype != "BF16":
        return "it needs bfloat16 parameters with a float32 master, as precision='bf16-true' gives them"
    for adopted in owners:
        if not isinstance(adopted.rule, AdamRule):
            return f"{type(adopted.optimizer).__name__} is not run by the kernel of Adam, which alone keeps this form"
        if adopted.suffix:
            return "two optimizers update it, and its second moments, of which the form needs one, would be two"
    return ""
