"""One tensor that waits for backward: what it looks like, and where its values are now.

The *image* of a tensor is the bytes that lie on disk for it: its stretch of its storage, strides and gaps and all, so
that what comes back has the same strides; or, of a thin view of something much larger, only its elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_ssd.activations.spill_io import SpillState
from lightning_ssd.sizes import KiB, round_up
from lightning_ssd.store.layout import MEMORY_ALIGNMENT

MIN_NBYTES = 64 * KiB
"""Tensors on smaller storages stay where they are: a transfer costs more than the memory is worth."""

THIN = 2
"""A view whose stretch of storage is more than this many times its elements is stored without the gaps."""


@dataclass(frozen=True)
class TensorLayout:
    """What a tensor looks like. Bytes.

    Attributes:
        size: As of the tensor.
        stride: As of the tensor, in elements.
        dtype: As of the tensor.
        device: As of the tensor.
        pad: Place of its first byte past a multiple of 64, so that compute takes the same code paths.
        stretch_nbytes: From there to its last element, gaps included.
        data_nbytes: What is stored of it.
    """

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    pad: int
    stretch_nbytes: int
    data_nbytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> TensorLayout:
        """The form of ``tensor``, which has elements."""
        itemsize = tensor.dtype.itemsize
        reach = sum((n - 1) * step for n, step in zip(tensor.size(), tensor.stride(), strict=True))
        stretch, data = (reach + 1) * itemsize, tensor.numel() * itemsize
        pad = tensor.data_ptr() % MEMORY_ALIGNMENT
        return cls(
            tensor.size(),
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            pad if pad % itemsize == 0 else 0,
            stretch,
            data if stretch > THIN * data else stretch,
        )

    @property
    def is_thin(self) -> bool:
        """Stored without the gaps between its elements."""
        return self.data_nbytes < self.stretch_nbytes

    @property
    def begin(self) -> int:
        """First byte of the image that belongs to the tensor."""
        return 0 if self.is_thin else self.pad

    @property
    def nbytes(self) -> int:
        """Size of the image: whole blocks, so that nothing goes through the page cache."""
        return round_up(self.begin + self.data_nbytes)

    def bytes_of(self, tensor: Tensor) -> Tensor:
        """The bytes that are stored of ``tensor``: 1D uint8, on its device; a copy if it is thin."""
        if self.is_thin:
            flat = tensor.contiguous().view(-1)
        else:
            flat = tensor.as_strided((self.stretch_nbytes // self.dtype.itemsize,), (1,), tensor.storage_offset())
        return flat.view(torch.uint8)

    def tensor_on(self, image: Tensor) -> Tensor:
        """The tensor whose image is ``image`` (1D uint8, 64-aligned); views it unless it is thin."""
        end = self.pad + self.stretch_nbytes
        # A thin one gets its gaps back too, with no values in them: kernels may choose by strides.
        whole = torch.empty(end, dtype=torch.uint8, device=image.device) if self.is_thin else image
        tensor = whole[self.pad : end].view(self.dtype).as_strided(self.size, self.stride)
        if self.is_thin:
            tensor.copy_(image[: self.data_nbytes].view(self.dtype).view(self.size))
        return tensor


class SavedInput:
    """One tensor that frames gave.

    Attributes:
        unit: The first unit that it is an input of.
        form: What it looks like.
        values: It, detached, while its values are in memory; afterwards without elements.
        is_shared: More than one frame gave it.
        place: What it has taken.
    """

    def __init__(self, unit: str, tensor: Tensor) -> None:
        self.unit = unit
        self.form = TensorLayout.of(tensor)
        self.values = tensor.detach()
        self.has_values = True
        self.is_shared = False
        self.place = SpillState()
        self._version = None if tensor.is_inference() else tensor._version
        # While this lives, no other storage has the same number.
        self.storage: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has changed the tensor in place since it was given."""
        # A detached tensor shares the version with it, and goes on to do so without elements.
        return self._version is None or self.values._version == self._version

    def drop_values(self) -> None:
        """Hold the memory no longer; go on to watch for changes."""
        self.has_values = False
        self.place.counted_nbytes = 0
        if self._version is None:
            del self.values  # an inference tensor has no version to watch
        else:
            self.values.data = torch.empty(0, dtype=self.form.dtype, device=self.form.device)

    @property
    def num_holders(self) -> int:
        """Tensors that hold the storage, this one among them."""
        storage = self.values.untyped_storage()  # which holds it too
        return int(torch._C._storage_Use_Count(storage._cdata)) - 1


def key_of(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same values at the same place, as long as one of them is alive."""
    storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    version = None if tensor.is_inference() else tensor._version
    return storage.cdata, tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype, version


def can_keep(tensor: Tensor, device: torch.device) -> bool:
    """Whether the values of ``tensor`` may be moved away: nobody needs just this tensor, and it is large."""
    if (
        type(tensor) is not Tensor
        or tensor.layout is not torch.strided
        or tensor.device.type not in ("cpu", device.type)
    ):
        return False
    is_users = tensor.is_leaf and tensor.requires_grad  # a parameter, or a leaf that autograd holds
    if is_users or isinstance(tensor._base, nn.Parameter) or tensor.numel() == 0:
        return False
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return False
    try:
        # Of a view the whole storage: that is what it keeps from being freed.
        return tensor.data_ptr() != 0 and tensor.untyped_storage().nbytes() >= MIN_NBYTES
    except (RuntimeError, NotImplementedError):
        return False  # a tensor without storage of its own, such as one under functorch
