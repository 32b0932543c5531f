"""Strides as arithmetic: whatever torch makes dense comes back from its flat elements with values and strides."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ssd.store.strides import flatten, is_dense, memory_order, memory_shape, stride_of, unflatten


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=5).flatmap(lambda s: st.tuples(st.just(s), st.permutations(range(len(s))))))
def test_a_dense_tensor_is_its_flat_elements_and_its_strides(case: tuple[list[int], list[int]]) -> None:
    sizes, order = case
    numel = int(torch.tensor(sizes).prod())
    tensor = torch.arange(numel).reshape(sizes).permute(order)
    shape, stride = tuple(tensor.shape), stride_of(tensor)
    flat = flatten(tensor, shape, stride)
    assert flat.data_ptr() == tensor.data_ptr()
    assert flat.tolist() == list(range(numel))
    again = unflatten(flat.clone(), shape, stride)
    assert torch.equal(again, tensor)
    assert again.stride() == tensor.stride()
    assert is_dense(shape, tensor.stride())
    assert tensor.permute(memory_order(shape, tensor.stride())).is_contiguous()
    assert memory_shape(shape, tensor.stride()) == tuple(tensor.permute(memory_order(shape, tensor.stride())).shape)
    # Values that lie in the order of the shape are brought into this order.
    assert torch.equal(flatten(tensor.contiguous(), shape, stride), flat)


def test_gaps_and_repetitions_are_not_dense() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    for tensor in (whole[:, ::2], whole[:, :3], whole[0].expand(4, 6), whole[:2].t()[1:], whole.t()[:3]):
        assert not is_dense(tensor.shape, tensor.stride())
        assert stride_of(tensor) is None
    assert is_dense(whole[1:].t().shape, whole[1:].t().stride())
    assert is_dense((0, 3), (7, 9))  # nothing leaves no gaps
