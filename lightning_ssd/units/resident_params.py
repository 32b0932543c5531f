"""Which parameter a tensor views."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ssd.device.param_copies import DeviceCopy
from lightning_ssd.units.unit import Unit


@dataclass(frozen=True, slots=True)
class ResidentParam:
    """A parameter of a resident unit.

    Attributes:
        unit: Its unit.
        index: Its index there.
        device_copy: What it views.
    """

    unit: Unit
    index: int
    device_copy: DeviceCopy


class ResidentParams:
    """The parameters of resident units, by the address of their storage."""

    def __init__(self) -> None:
        self._params: dict[int, ResidentParam] = {}

    def add(self, unit: Unit, device_copy: DeviceCopy) -> None:
        """``unit`` is resident: its parameters view ``device_copy``."""
        for index, tensor in enumerate(device_copy.tensors):
            if tensor.numel():
                self._params[tensor.untyped_storage().data_ptr()] = ResidentParam(unit, index, device_copy)

    def find(self, tensor: Tensor) -> ResidentParam | None:
        """The parameter that ``tensor`` views, or None."""
        if not self._params or tensor.layout is not torch.strided:
            return None
        with torch._C.DisableTorchFunctionSubclass():
            try:
                param = self._params.get(tensor.untyped_storage().data_ptr())
            except (RuntimeError, NotImplementedError):
                return None  # a tensor without storage of its own, such as one under functorch
        # What was released leaves its entry, until something else is placed there.
        return param if param is not None and param.unit.device_copy is param.device_copy else None

    def units_of(self, tensors: Iterable[Tensor]) -> list[Unit]:
        """The units that ``tensors`` view, each once."""
        found = filter(None, map(self.find, tensors))
        return list({param.unit.name: param.unit for param in found}.values())
