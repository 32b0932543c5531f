"""The lines that a run logs before its first step: units, memory plan, disk, updates."""

from __future__ import annotations

import os

import torch

from lightning_ssd.cut.largest import remark
from lightning_ssd.kernels import api as kernels
from lightning_ssd.memory.plan import MemoryPlan
from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.optim.whole import WholeRule
from lightning_ssd.session.session import Session
from lightning_ssd.sizes import fmt


def summary(session: Session) -> str:
    """The units, plan and optimizers of a started session, a line for each."""
    plan = session.running.plan
    lines = [*_plan_lines(session, plan)]
    if session.optimizers and any(unit.dtype in (torch.bfloat16, torch.float16) for unit in session.units):
        keeps = session.settings.keep_master
        how = "on float32 masters" if keeps else "themselves (no float32 master)"
        lines.append(f"  16-bit parameters: updated {how}; master={session.settings.master!r}")
    trained = session.sizing.trained()
    forms = {name: sum(unit.form.name == name for unit in trained) for name in sorted({u.form.name for u in trained})}
    if forms.keys() - {"fp32"}:
        units = ", ".join(f"{name} in {num} units" for name, num in forms.items())
        lines.append(f"  state on disk: {units}; state={session.settings.state!r}")
    if session.optimizers and session.settings.device.type == "cpu" and _spins() and not plan.fits:
        lines.append(
            "  hint: compute threads spin while they wait for each other, and take CPU time from updates; set "
            "GOMP_SPINCOUNT=1000 in the environment"
        )
    return "\n".join([*lines, *(_update_line(adopted, plan) for adopted in session.optimizers)])


def _plan_lines(session: Session, plan: MemoryPlan) -> list[str]:
    settings, num = session.settings, len(session.units)
    if not session.units:
        return ["ssd_offload: the model has no parameters, so nothing streams"]
    largest = max((unit.layout for unit in session.units), key=lambda layout: layout.data_nbytes)
    numel = sum(unit.layout.numel for unit in session.units)
    nbytes = settings.budget_nbytes
    budget = "the smallest plan that streams" if nbytes is None else f"host_memory={fmt(nbytes)}"
    reserves = {
        "in memory": plan.in_memory_nbytes,
        "parameters in use": plan.param_nbytes,
        "gradients": plan.grad_nbytes,
        "update": plan.update_nbytes + plan.temporary_nbytes,
        "saved inputs": plan.activation_nbytes + plan.spill_nbytes,
        "staging": plan.staging_nbytes,
    }
    shapes = {entry.name: entry.shape for entry in largest.entries}
    numels = [unit.layout.numel for unit in session.units]
    why = remark(largest.unit, shapes, numels, min_numel=settings.min_unit_numel)
    held = f"parameters of {len(plan.in_memory_params)} and states of {len(plan.in_memory_states)} of {num} units"
    return [
        f"ssd_offload: {numel:,} parameters in {num} units, the largest {largest.unit!r} with "
        f"{fmt(largest.data_nbytes)}",
        *([f"  {why}"] if why else []),
        f"  host memory: {fmt(plan.host_nbytes)} of {budget} (smallest that works: {fmt(plan.smallest_nbytes)}): "
        + ", ".join(f"{name} {fmt(nbytes)}" for name, nbytes in reserves.items() if nbytes),
        f"  in memory: {'everything; steps do not touch the disk' if plan.fits else held}"
        + ("; blocks run their forward again in backward" if plan.recomputes else ""),
        f"  disk: {fmt(session.store.nbytes_on_disk + session.sizing.disk_nbytes)} in "
        f"{', '.join(map(repr, settings.roots))} ({session.engine.reason})",
    ]


def _update_line(adopted: OptimizerAdapter, plan: MemoryPlan) -> str:
    name = type(adopted.optimizer).__name__
    if isinstance(adopted.rule, WholeRule):
        return (
            f"  update: {name} runs its own step on all its parameters at once, which stay in memory with "
            f"{fmt(plan.whole_nbytes)} of state: {adopted.rule.why}"
        )
    if adopted.rule.has_kernel:
        equal = "bit-equal" if kernels.is_bit_equal_to_torch() else "within 1 ulp an operation of"
        return f"  update: {name} by {kernels.describe()}, {equal} torch's for-loop {name} on this machine"
    if adopted.rule.is_elementwise:
        return f"  update: {name} by {type(adopted.rule).__name__}, piece by piece"
    return f"  update: {name} runs its own class, one parameter at a time (bit-equal to plain torch)"


def _spins() -> bool:
    """Whether OpenMP threads spin while they wait, with no limit set in the environment."""
    return not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() and torch.get_num_threads() > 1
