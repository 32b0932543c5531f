"""Disk space and memory that the units of a session need, once its optimizers are known."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from lightning_ssd.kernels.bits import BLOCK_NUMEL
from lightning_ssd.memory.plan import Demand, MemoryPlan, UnitSize, make_plan
from lightning_ssd.memory.pool import pool_nbytes
from lightning_ssd.optim.adapter import OptimizerAdapter
from lightning_ssd.optim.temporaries import temporary_share
from lightning_ssd.optim.whole import WholeRule
from lightning_ssd.session.settings import AUTO_FILE_NBYTES, Settings
from lightning_ssd.sizes import round_up
from lightning_ssd.step.recompute import keeps_activations
from lightning_ssd.store.dtypes import dtype_of
from lightning_ssd.store.layout import UnitLayout
from lightning_ssd.units.model_units import chains
from lightning_ssd.units.unit import Unit


class Sizing:
    """Sizes of one model's units.

    Args:
        settings: What the user set.
        units: The model's units.
        optimizers: The adopted optimizers.
    """

    def __init__(self, settings: Settings, units: list[Unit], optimizers: list[OptimizerAdapter]) -> None:
        self._settings = settings
        self._units = units
        self._optimizers = optimizers
        self._is_off_host = settings.is_off_host
        self._temporary_shares: dict[int, float] = {}  # by number of dimensions

    @property
    def is_overlapped(self) -> bool:
        """Whether updates run beside compute.

        Under a ``-true`` precision a forward sets the default dtype, which is one for all threads. Code that makes
        tensors of it, as state, is then not run beside one. torch's own classes ask only whether it is float64.
        """
        dtype = self._settings.param_dtype
        classes = [type(adopted.optimizer) for adopted in self._optimizers if not adopted.rule.has_kernel]
        may_ask = [c for c in classes if dtype == torch.float64 or not c.__module__.startswith("torch.optim.")]
        return self._settings.is_overlapped and (dtype is None or not may_ask)

    @property
    def disk_nbytes(self) -> int:
        """Bytes that the run still needs on disk: optimizer state, generations being written, gradients."""
        nbytes = {unit: sum(layout.data_nbytes for layout in self.state_layouts(unit)) for unit in self.trained()}
        state = sum(nbytes.values())
        in_flight = max((own + unit.layout.data_nbytes for unit, own in nbytes.items()), default=0)
        spilled = sum(unit.layout.data_nbytes for unit in self.trained())
        return state + in_flight + spilled

    def checkpoint_nbytes(self, *, with_state: bool) -> tuple[int, int]:
        """Bytes of the unit files of a checkpoint, and how many of them the next steps replace.

        Args:
            with_state: With the optimizer's state and masters, else parameters alone.
        """
        whole = changing = 0
        trained = {unit.name for unit in self.trained()}
        for unit in self._units:
            layouts = [unit.layout]
            if with_state and unit.name in trained:
                layouts += self.state_layouts(unit)
            nbytes = sum(layout.file_nbytes for layout in layouts)
            whole += nbytes
            changing += nbytes if unit.name in trained else 0
        return whole, changing

    @property
    def saves_files(self) -> bool:
        """Whether a checkpoint is one file; else a directory of links."""
        form = self._settings.checkpoint
        return form == "file" or (form == "auto" and self.checkpoint_nbytes(with_state=True)[0] < AUTO_FILE_NBYTES)

    @property
    def num_generations(self) -> int:
        """Files of all units: parameters, optimizer state and masters."""
        return len(self._units) + sum(len(self.state_layouts(unit)) for unit in self.trained())

    @property
    def num_spare(self) -> int:
        """Further files that are being written, or wait to be recycled, at most."""
        kinds = [[unit.layout, *self.state_layouts(unit)] for unit in self.trained()]
        sizes = {layout.file_nbytes for layouts in kinds for layout in layouts}
        # At most two units are being written at a time, and one file per size and kind waits.
        return len(sizes) + 3 * max(map(len, kinds), default=0)

    def blocks(self) -> set[nn.Module]:
        """Blocks whose forward can be run again in backward."""
        return {unit.block for unit in self._units if unit.block is not None and not keeps_activations(unit.block)}

    def trained(self) -> list[Unit]:
        """Units that an optimizer updates."""
        owned = {param for adopted in self._optimizers for param in adopted.params()}
        return [unit for unit in self._units if any(p in owned and p.requires_grad for p in unit.params)]

    def _state_kinds(self, unit: Unit) -> set[str]:
        kinds: set[str] = set()
        mine = set(unit.params)
        for adopted in self._optimizers:
            for group in adopted.optimizer.param_groups:
                if not mine.isdisjoint(group["params"]):
                    kinds.update(kind + adopted.suffix for kind in adopted.rule.kinds(group))
        return kinds

    def state_layouts(self, unit: Unit) -> list[UnitLayout]:
        """Layouts of the files of the optimizer state and the master of ``unit``."""
        kinds = sorted(self._state_kinds(unit)) + (["master"] if unit.has_master else [])
        return [unit.layout_of(file) for file in unit.form.layouts(kinds)]

    def _state_nbytes(self, unit: Unit, num_kinds: int | None = None) -> int:
        """Bytes per element of a unit's state beyond the parameter itself."""
        if num_kinds is None:
            num_kinds = len(self._state_kinds(unit))
        return dtype_of(unit.state_dtype).itemsize * (num_kinds + unit.has_master)

    def plan(self, module: nn.Module, *, waits_for_all_grads: bool) -> MemoryPlan:
        """The plan of host memory.

        Raises:
            MemoryPlanError: If the budget cannot work.
        """
        uses = Counter(param for _, param in module.named_parameters(remove_duplicate=False))
        shared = {param for param, num_uses in uses.items() if num_uses > 1}
        whole = [adopted for adopted in self._optimizers if isinstance(adopted.rule, WholeRule)]
        sizes = self._unit_sizes(shared, whole)
        recomputes = {"auto": None, "recompute": True, "keep": False}[self._settings.activations]
        if not self._optimizers or not self.blocks():
            recomputes = False
        return make_plan(
            sizes,
            chains(module, self._units),
            budget_nbytes=self._settings.budget_nbytes,
            demand=Demand(
                is_elementwise=all(adopted.rule.is_elementwise for adopted in self._optimizers),
                is_overlapped=self.is_overlapped,
                waits_for_all_grads=waits_for_all_grads,
                window=self._settings.window_size,
                recomputes=recomputes,
                sums_in_place=self._settings.is_autocast,
                whole_nbytes=sum(map(_whole_nbytes, whole)),
            ),
        )

    def _unit_sizes(self, shared: set[nn.Parameter], whole: list[OptimizerAdapter]) -> list[UnitSize]:
        trained = {unit.name for unit in self.trained()}
        updated_whole = {param for adopted in whole for param in adopted.params()}
        most_kinds = max((len(self._state_kinds(unit)) for unit in self._units), default=0)
        sizes = []
        for unit in self._units:
            # A frozen unit may be trained later in the run: plan room for its update too.
            can_train = len(whole) < len(self._optimizers) and unit.params[0].is_floating_point()
            is_trained = unit.name in trained
            sizes.append(
                UnitSize(
                    unit.name,
                    unit.layout.buffer_nbytes,
                    self._grad_nbytes(unit) if is_trained else 0,
                    unit.layout.numel if can_train else 0,
                    unit.layout.itemsize,
                    self._state_nbytes(unit, None if is_trained else most_kinds),
                    sum(layout.buffer_nbytes for layout in self.state_layouts(unit)) if is_trained else 0,
                    self._shared_grad_nbytes(unit, shared) if is_trained else 0,
                    self._temporary_nbytes(unit) if can_train else 0,
                    is_persistent=unit.persistent or not updated_whole.isdisjoint(unit.params),
                )
            )
        return sizes

    def _grad_nbytes(self, unit: Unit) -> int:
        """Host memory of the gradients of ``unit``; from a device, each is copied into a buffer of its own."""
        if not self._is_off_host:
            return unit.layout.data_nbytes
        return sum(pool_nbytes(entry.nbytes) for entry in unit.layout.entries)

    def _shared_grad_nbytes(self, unit: Unit, shared: set[nn.Parameter]) -> int:
        """Host memory of the gradients of parameters of ``unit`` that several modules have."""
        if self._is_off_host:
            return 0  # autograd adds them up on the device
        entries = zip(unit.params, unit.layout.entries, strict=True)
        return sum(entry.nbytes for param, entry in entries if param in shared and param.requires_grad)

    def _temporary_nbytes(self, unit: Unit) -> int:
        """Bytes that an update allocates beside the plan's buffers: of the optimizer class, or of blocks of moments."""
        if self._settings.state == "int8":
            num_blocks = unit.layout.numel // BLOCK_NUMEL + len(unit.params)
            return 2 * 2 * round_up(num_blocks * 4)  # of two moments, in this update and the one before
        if not any(self._temporary_share(param.dim()) for param in unit.params):
            return 0
        dtype = dtype_of(unit.state_dtype)
        widened = 0 if dtype == unit.dtype else 1  # its gradient
        return max(int((self._temporary_share(p.dim()) + widened) * p.numel() * dtype.itemsize) for p in unit.params)

    def _temporary_share(self, num_dims: int) -> float:
        """The same, per byte of a parameter with ``num_dims`` dimensions; 0 if all rules are fused kernels."""
        if num_dims not in self._temporary_shares:
            self._temporary_shares[num_dims] = max(
                (
                    temporary_share(adopted.rule, {k: v for k, v in group.items() if k != "params"}, num_dims)
                    for adopted in self._optimizers
                    if not adopted.rule.is_elementwise
                    for group in adopted.optimizer.param_groups
                    if any(param.dim() == num_dims for param in group["params"])
                ),
                default=0.0,
            )
        return self._temporary_shares[num_dims]


def _whole_nbytes(adopted: OptimizerAdapter) -> int:
    """Bytes of state of an optimizer that runs whole, estimated by its trial; 0 for others."""
    if not isinstance(adopted.rule, WholeRule):
        return 0
    return int(adopted.rule.state_ratio * sum(param.nbytes for param in adopted.params()))
