"""Tensors that are decoded when their values are first used.

`torch.optim.Optimizer.state_dict` and an opened checkpoint show all of the state at once, which need not fit in
memory. Where it is stored as it is computed, its tensors are mapped from files. Where it is encoded, they are of the
class here. Code of ours reads one with `values_of`, which keeps nothing. For any other code it is decoded once and
kept, so that what is written to it stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_ssd.codec.encodings import BY_BLOCK, Encoding
from lightning_ssd.store.strides import Stride, flatten, stride_of, unflatten
from lightning_ssd.store.tensor_metadata import METADATA

_VERSION = vars(torch._C.TensorBase)["_version"].__get__


class DecodedTensor(Tensor):
    """A float32 tensor whose values are decoded when they are first used; see `decoded`."""

    _encoding: Encoding
    _parts: Mapping[str, Tensor]
    _kept: Tensor | None
    _stride: Stride | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in METADATA and func != _VERSION:
                return func(*args, **(kwargs or {}))
            if func == _VERSION:
                kept = args[0]._kept
                return 0 if kept is None else kept._version
            return _on_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _on_values(func, args, kwargs)

    @property
    def was_written(self) -> bool:
        """Whether somebody wrote to its values, perhaps by ``.data``, of which no version tells."""
        kept = self._kept
        return kept is not None and not torch.equal(kept.view(torch.int32), self._decode().view(torch.int32))

    def decode(self, *, keep: bool) -> Tensor:
        """Its values, as a plain tensor; with ``keep`` the same one from now on."""
        if self._kept is not None:
            return self._kept
        found = self._decode()
        if keep:
            self._kept = found
        return found

    def _decode(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            flat = {
                kind: part.detach() if kind in BY_BLOCK else flatten(part.detach(), self.shape, self._stride)
                for kind, part in self._parts.items()
            }
            return unflatten(self._encoding.decode(flat), self.shape, self._stride)


def decoded(encoding: Encoding, parts: Mapping[str, Tensor], shape: Sequence[int]) -> DecodedTensor:
    """The values of one parameter of which files have ``parts``.

    Args:
        encoding: How they are decoded.
        parts: Tensors, usually mapped, by the kind of their file.
        shape: Of the parameter.
    """
    with torch.inference_mode(False):
        stride = stride_of(next(iter(parts.values())))  # all parts have the parameter's
        made = Tensor._make_wrapper_subclass(DecodedTensor, tuple(shape), strides=stride, dtype=torch.float32)
    made._encoding, made._parts, made._kept, made._stride = encoding, parts, None, stride
    return made


def values_of(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or if it is decoded on use, its values, which are not kept."""
    return tensor.decode(keep=False) if isinstance(tensor, DecodedTensor) else tensor


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    keep = func != Tensor.__reduce_ex__  # a pickle holds the values itself
    plain = tree_map_only(DecodedTensor, lambda each: each.decode(keep=keep), (args, kwargs or {}))
    return func(*plain[0], **plain[1])
