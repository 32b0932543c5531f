"""Layouts of random units: every byte has one place, aligned where it must be."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ssd.sizes import BLOCK_NBYTES
from lightning_ssd.store.layout import MEMORY_ALIGNMENT, Shape, UnitLayout, chunks, file_order, lay_out
from lightning_ssd.store.safetensors_header import ITEMSIZE


@st.composite
def layouts(draw: st.DrawFn) -> UnitLayout:
    dtype = draw(st.sampled_from(["F32", "BF16", "F64", "U8"]))
    dims = st.lists(st.integers(0, 40), max_size=3).map(tuple)
    shapes = [Shape(f"p{i}", shape) for i, shape in enumerate(draw(st.lists(dims, max_size=10)))]
    return lay_out("unit", "param", file_order(shapes, ITEMSIZE[dtype]), dtype)


@given(layouts())
@settings(deadline=None, database=None)
def test_file_and_buffer_hold_every_parameter_once(layout: UnitLayout) -> None:
    assert layout.data_begin % BLOCK_NBYTES == 0
    position = 0
    for entry in layout.entries:  # in the file: one after the other, no hole
        assert entry.begin == position
        position = entry.end
    assert position == layout.data_nbytes == layout.numel * layout.itemsize
    assert layout.file_nbytes == layout.data_begin + position
    # In the buffer: aligned, apart, and moved ones clear of what the read fills.
    assert layout.buffer_nbytes % BLOCK_NBYTES == 0
    spans = []
    for entry, place in zip(layout.entries, layout.places, strict=True):
        assert entry.nbytes == 0 or place % MEMORY_ALIGNMENT == 0
        assert place == entry.begin or place >= layout.data_nbytes
        spans.append((place, place + entry.nbytes))
    filled = sorted(span for span in spans if span[0] < span[1])
    assert all(a[1] <= b[0] for a, b in pairwise(filled))
    assert all(end <= layout.buffer_nbytes for _, end in filled)


@given(layouts(), st.integers(1, 5000))
@settings(deadline=None, database=None)
def test_segments_of_chunks_cover_each_parameter_once(layout: UnitLayout, chunk_numel: int) -> None:
    covered: dict[int, int] = {}
    position = 0
    for begin, end in chunks(layout.numel, chunk_numel):
        assert begin == position
        for segment in layout.segments(begin, end):
            assert segment.begin == position
            assert segment.offset == covered.get(segment.index, 0)
            covered[segment.index] = segment.offset + segment.numel
            position = segment.end
        assert position == end
    assert position == layout.numel
    sizes = {i: e.nbytes // layout.itemsize for i, e in enumerate(layout.entries) if e.nbytes}
    assert covered == sizes


@given(layouts(), st.sampled_from(["F32", "BF16"]))
@settings(deadline=None, database=None)
def test_every_kind_has_the_same_elements_at_the_same_index(layout: UnitLayout, dtype: str) -> None:
    shapes = [Shape(entry.name, entry.shape) for entry in layout.entries]
    other = lay_out("unit", "exp_avg", shapes, dtype)
    assert list(other.segments(0, other.numel)) == list(layout.segments(0, layout.numel))
