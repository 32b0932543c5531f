"""What the user set, checked, as the parts take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_ssd.io.engine import IOOptions
from lightning_ssd.units.partition import UnitPolicy


@dataclass(frozen=True)
class Settings:
    """What the user set, checked. Sizes in bytes.

    Attributes:
        roots: Directories for the live store, one per disk.
        budget_nbytes: Host memory; None for the smallest plan that streams.
        device: Where compute runs.
        device_nbytes: Device memory for parameters; None for what lets one unit arrive while others compute.
        units: Which modules become units.
        min_unit_numel: Elements from which a leftover is a unit of its own.
        activations: ``"auto"``, ``"recompute"`` or ``"keep"``.
        overlap: Updates run beside compute; else after it.
        update: ``"auto"``, ``"native"`` or ``"torch"``.
        window: Units in memory at once, the one in use among them; None for as many as the plan has room for.
        prefetch_batch: Units whose reads are started together.
        verify: Check every read against checksums.
        io: Disk transport.
        param_dtype: Dtype of floating parameters in the store; None leaves them as they are.
        keep_master: Keep a float32 master of 16-bit parameters.
        is_autocast: Compute runs under autocast.
        keep_store: Leave the files when the run ends.
    """

    roots: list[str]
    budget_nbytes: int | None
    device: torch.device
    device_nbytes: int | None
    units: UnitPolicy
    min_unit_numel: int
    activations: str
    overlap: bool
    update: str
    window: int | None
    prefetch_batch: int
    verify: bool
    io: IOOptions
    param_dtype: torch.dtype | None
    keep_master: bool
    is_autocast: bool
    keep_store: bool

    @property
    def is_off_host(self) -> bool:
        """Whether compute runs on a device with memory of its own."""
        return self.device.type != "cpu"
