"""How much of a device units and saved inputs may take where the user has not said. Sizes in bytes.

[Note: device allowance] What activations and workspaces take is not known before a step has run. So the first step of
each kind, of training and of evaluation, has as little as works. From what the allocator has given by then beside units
and inputs, and from what the device has left, later steps get all but a reserve (`device_plan.device_allowance`).
"""

from __future__ import annotations

import torch

from lightning_ssd.memory.device_plan import device_allowance


class LearnedAllowance:
    """What the steps of a run may take of a device; see [Note: device allowance].

    Args:
        device: The device.
        smallest_nbytes: As little as works.
    """

    def __init__(self, device: torch.device, smallest_nbytes: int) -> None:
        self._device = device
        self._smallest_nbytes = smallest_nbytes
        self._others_nbytes = 0  # the most that was given beside units and inputs
        self._by_kind: dict[str, int] = {}

    def of_step(self, kind: str, most_nbytes: int) -> int:
        """What a step may take that begins now.

        Args:
            kind: Such as ``"train"``.
            most_nbytes: The most that units and inputs have taken at a time until now.
        """
        if self._by_kind:
            others_nbytes = torch.cuda.max_memory_allocated(self._device) - most_nbytes
            if others_nbytes > self._others_nbytes:
                self._others_nbytes = others_nbytes
                self._by_kind = dict.fromkeys(self._by_kind, -1)  # to be computed again
        if kind not in self._by_kind:
            self._by_kind[kind] = -1
            return self._smallest_nbytes
        if self._by_kind[kind] < 0:
            self._by_kind[kind] = max(self._left_nbytes(), self._smallest_nbytes)
        return self._by_kind[kind]

    def _left_nbytes(self) -> int:
        free_nbytes, total_nbytes = torch.cuda.mem_get_info(self._device)
        ours_nbytes = free_nbytes + torch.cuda.memory_reserved(self._device)
        return device_allowance(total_nbytes, ours_nbytes, self._others_nbytes)
