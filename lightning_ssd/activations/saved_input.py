"""One saved input: the layout of its tensor, and where its values are now.

The *aligned bytes* of a tensor are what is stored of it in a host buffer or on disk: its span of its storage, gaps
between the elements included, so that the tensor comes back with the same strides. Of a view whose elements lie far
apart only the elements are stored (the tensor is *packed*).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_ssd.activations.spill_state import SpillState
from lightning_ssd.device.streams import Event
from lightning_ssd.sizes import KiB, round_up
from lightning_ssd.store.layout import MEMORY_ALIGNMENT

MIN_NBYTES = 64 * KiB
"""Tensors on smaller storages are not saved here: a transfer costs more than the memory is worth."""

MAX_SPAN_RATIO = 2
"""A tensor is packed if its span is more than this many times its elements."""


@dataclass(frozen=True)
class TensorLayout:
    """Size, strides and dtype of a tensor, and how many bytes are stored of it.

    Attributes:
        size: As of the tensor.
        stride: As of the tensor, in elements.
        dtype: As of the tensor.
        device: As of the tensor.
        pad: Address of its first byte modulo 64. The tensor comes back at the same offset, since kernels choose their
            code path by alignment.
        span_nbytes: Bytes from its first element to its last, gaps included.
        stored_nbytes: Bytes that are stored of it.
    """

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    pad: int
    span_nbytes: int
    stored_nbytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> TensorLayout:
        """The layout of ``tensor``, which has at least one element."""
        itemsize = tensor.dtype.itemsize
        last = sum((n - 1) * step for n, step in zip(tensor.size(), tensor.stride(), strict=True))
        span, packed = (last + 1) * itemsize, tensor.numel() * itemsize
        pad = tensor.data_ptr() % MEMORY_ALIGNMENT
        return cls(
            tensor.size(),
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            pad if pad % itemsize == 0 else 0,
            span,
            packed if span > MAX_SPAN_RATIO * packed else span,
        )

    @property
    def is_packed(self) -> bool:
        """Whether it is stored without the gaps between its elements."""
        return self.stored_nbytes < self.span_nbytes

    @property
    def begin(self) -> int:
        """Index of the first of the aligned bytes that belongs to the tensor."""
        return 0 if self.is_packed else self.pad

    @property
    def aligned_nbytes(self) -> int:
        """Number of aligned bytes: whole blocks, so that transfers bypass the page cache."""
        return round_up(self.begin + self.stored_nbytes)

    def bytes_of(self, tensor: Tensor) -> Tensor:
        """The bytes that are stored of ``tensor``: 1D uint8, on its device; a copy if it is packed, else a view."""
        if self.is_packed:
            flat = tensor.contiguous().view(-1)
        else:
            flat = tensor.as_strided((self.span_nbytes // self.dtype.itemsize,), (1,), tensor.storage_offset())
        return flat.view(torch.uint8)

    def tensor_on(self, aligned: Tensor) -> Tensor:
        """The tensor with these aligned bytes (1D uint8, 64-aligned): a view of them unless it is packed."""
        end = self.pad + self.span_nbytes
        # A packed one gets its gaps back too, with no values in them: kernels may choose by strides.
        whole = torch.empty(end, dtype=torch.uint8, device=aligned.device) if self.is_packed else aligned
        tensor = whole[self.pad : end].view(self.dtype).as_strided(self.size, self.stride)
        if self.is_packed:
            tensor.copy_(aligned[: self.stored_nbytes].view(self.dtype).view(self.size))
        return tensor


class SavedInput:
    """One tensor that is an input of one frame or of several.

    Attributes:
        unit: The first unit that it is an input of.
        layout: Its layout.
        values: The tensor, detached, while its values are in memory; afterwards without elements.
        has_values: Whether they are.
        is_shared: It is an input of more than one frame.
        state: The memory and disk space that it has; outlives it.
        made: By then compute has made the values; None on the host.
        storage: Its storage, held weakly.
    """

    def __init__(self, unit: str, tensor: Tensor, made: Event | None = None) -> None:
        self.unit = unit
        self.layout = TensorLayout.of(tensor)
        self.values = tensor.detach()
        self.has_values = True
        self.is_shared = False
        self.made = made
        self.state = SpillState()
        self._version = None if tensor.is_inference() else tensor._version
        # While this lives, no other storage gets the same number.
        self.storage: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has changed the tensor in place since it was saved."""
        # A detached tensor shares the version counter, also once it has no elements.
        return self._version is None or self.values._version == self._version

    def drop_values(self) -> None:
        """Let go of the memory; changes in place are still noticed."""
        self.has_values = False
        self.state.counted_nbytes = 0
        if self._version is None:
            del self.values  # an inference tensor has no version to watch
        else:
            self.values.data = torch.empty(0, dtype=self.layout.dtype, device=self.layout.device)

    @property
    def num_holders(self) -> int:
        """Tensors that hold the storage, this one included."""
        storage = self.values.untyped_storage()  # which holds it too
        return int(torch._C._storage_Use_Count(storage._cdata)) - 1


def key_of(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that view the same values in the same way, as long as one of them is alive."""
    storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    version = None if tensor.is_inference() else tensor._version
    return storage.cdata, tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype, version


def can_save(tensor: Tensor, device: torch.device) -> bool:
    """Whether another tensor with the values of ``tensor`` can take its place, and it is large enough to be worth it.

    Parameters and leaves that require grad cannot: autograd accumulates into that very object.
    """
    if (
        type(tensor) is not Tensor
        or tensor.layout is not torch.strided
        or tensor.device.type not in ("cpu", device.type)
    ):
        return False
    if (tensor.is_leaf and tensor.requires_grad) or isinstance(tensor._base, nn.Parameter) or tensor.numel() == 0:
        return False
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return False
    try:
        # The whole storage counts: a view keeps all of it alive.
        return tensor.data_ptr() != 0 and tensor.untyped_storage().nbytes() >= MIN_NBYTES
    except (RuntimeError, NotImplementedError):
        return False  # a tensor without storage of its own, such as one under functorch
