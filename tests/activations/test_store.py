"""The store of saved inputs alone: what comes back, where it waits, and that everything is returned."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_ssd.activations import spill_files as spill
from lightning_ssd.activations.saved_input import MIN_NBYTES, can_save
from lightning_ssd.activations.spill_files import SpillFiles
from lightning_ssd.activations.store import FrameInputs
from lightning_ssd.io.deadline import Patience
from lightning_ssd.io.folder import Folder
from lightning_ssd.io.scratch import Scratch
from tests.helpers.activations import (
    BUFFER_NBYTES,
    NBYTES,
    NUMEL,
    bench,
    disk_nbytes,
    faulty,
    in_use_nbytes,
    keep,
    load_in_reverse,
    values,
)
from tests.helpers.events import Events
from tests.helpers.fake_device import OffHost
from tests.helpers.faulty import Fault, When

# -- where values wait ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, NBYTES, 3 * NBYTES, 6 * NBYTES, None])
def test_values_come_back_and_memory_is_bounded(tmp_store: Path, budget: int | None) -> None:
    with bench(tmp_store, budget=budget) as b:
        for _ in range(3):  # the second time the space of the first is used again
            frames = keep(b, *range(8))
            assert budget is None or b.held_nbytes <= budget
            load_in_reverse(frames, *range(8))
            b.assert_all_returned()
        assert b.num_spilled == (0 if budget is None else b.num_spilled)
        assert b.disk_nbytes in (0, spill.MIN_FILE_NBYTES)


def test_what_fits_is_not_written(tmp_store: Path) -> None:
    with bench(tmp_store, budget=8 * NUMEL * 4) as b:
        keep(b, *range(8))
        assert b.num_spilled == 0
        assert b.disk_nbytes == 0


def test_the_oldest_is_written_first(tmp_store: Path) -> None:
    with bench(tmp_store, budget=2 * NBYTES) as b:
        with Events() as events:
            frames = keep(b, *range(4))
        assert [event for event in events.found if event.startswith("spill ")] == ["spill unit 0", "spill unit 1"]
        assert [f.inputs[0].has_values for f in frames] == [False, False, True, True]


def test_memory_that_is_spilled_is_free(tmp_store: Path) -> None:
    with bench(tmp_store, budget=2 * NBYTES) as b:
        storages, frames = [], []
        for seed in range(8):
            x = values(seed)
            storages.append(StorageWeakRef(x.untyped_storage()))
            frames.append(b.store.save("a", [x]))
            del x
            b.store.enforce_budget()
            assert sum(not s.expired() for s in storages) <= 2
        load_in_reverse(frames, *range(8))


def test_what_somebody_else_holds_is_neither_counted_nor_written(tmp_store: Path) -> None:
    with bench(tmp_store, budget=0) as b:
        held = values(0)
        kept = b.store.save("a", [held])
        b.store.enforce_budget()
        assert (b.num_spilled, b.held_nbytes) == (0, 0)
        del held
        b.store.enforce_budget()
        assert b.num_spilled == 1
        assert torch.equal(kept.load()[0], values(0))


def test_a_tensor_that_frames_share_is_kept_once(tmp_store: Path) -> None:
    with bench(tmp_store, budget=0) as b:
        mask = values(100)
        frames = [b.store.save("a", [mask, values(i), mask[: NUMEL // 2], mask[:]]) for i in range(4)]
        del mask
        b.store.enforce_budget()
        assert b.num_spilled == 4 + 2  # each input; the mask and its half
        while frames:
            x, own, half, again = frames.pop().load()
            assert torch.equal(own, values(len(frames)))
            assert torch.equal(x, values(100))
            assert torch.equal(again, x)
            assert torch.equal(half, x[: NUMEL // 2])
        del x, own, half, again
        b.assert_all_returned()


def test_a_shared_tensor_is_read_once_if_it_fits(tmp_store: Path) -> None:
    with bench(tmp_store, budget=NBYTES) as b:
        mask = values(100)
        frames = [b.store.save("a", [mask]) for _ in range(4)]
        last = b.store.save("b", [values(0)])
        del mask
        b.store.enforce_budget()  # the mask is needed by the older frames, so it goes
        b.store.save("c", [values(1)])
        b.store.enforce_budget()
        del last
        while frames:
            assert torch.equal(frames.pop().load()[0], values(100))
        assert b.engine.stats().read_nbytes <= NBYTES


def test_halves_of_one_storage_can_go(tmp_store: Path) -> None:
    with bench(tmp_store, budget=0) as b:
        x = values(0).view(100, 200)
        storage = StorageWeakRef(x.untyped_storage())
        kept = b.store.save("a", list(x.chunk(2, 1)))
        del x
        b.store.enforce_budget()
        assert storage.expired()
        assert torch.equal(torch.cat(kept.load(), 1), values(0).view(100, 200))


def test_loading_twice_gives_the_same(tmp_store: Path) -> None:
    with bench(tmp_store, budget=NBYTES) as b:
        frames = keep(b, 0, 1, 2)
        for _ in range(2):
            for seed in (2, 1, 0):
                assert torch.equal(frames[seed].load()[0], values(seed))
        frames.clear()
        b.assert_all_returned()


# -- forms ---------------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.view(400, 400).t(),
    "expanded": lambda x: x.view(400, 1, 400).expand(400, 7, 400),
    "channels last": lambda x: x.view(1, 40, 40, 100).to(memory_format=torch.channels_last),
    "end of a storage": lambda x: x[1237:],
    "column": lambda x: x.view(400, 400)[:, 3:50],
    "rows apart": lambda x: x.view(400, 400)[::2],
    "scalar": lambda x: x[7],
    "bool": lambda x: x > 0,
    "int64": lambda x: (x * 100).long(),
    "bfloat16": lambda x: x.bfloat16()[1:],
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: torch.view_as_complex(x.view(-1, 2)),
    "float64": lambda x: x.double(),
}


@pytest.mark.parametrize("is_off_host", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back(tmp_store: Path, form: str, is_off_host: bool) -> None:
    with bench(tmp_store, budget=0, verify=True, streams=OffHost() if is_off_host else None) as b:
        x = FORMS[form](values(0, 8 * NUMEL))
        assert can_save(x, torch.device("cpu"))
        like = [x.dtype, x.size(), x.stride(), x.data_ptr() % 64]
        storage = StorageWeakRef(x.untyped_storage())
        kept = b.store.save("a", [x])
        del x
        b.store.enforce_budget()
        after = b.store.save("b", [values(1)])  # an input on a device leaves it once there is another
        b.store.enforce_budget()
        assert storage.expired()
        assert torch.equal(after.load()[0], values(1))
        y = kept.load()[0]
        expected = FORMS[form](values(0, 8 * NUMEL))
        assert torch.equal(_comparable(y), _comparable(expected))
        assert [y.dtype, y.size(), y.stride()] == like[:3]
        assert y.data_ptr() % 64 == like[3] or form in ("column", "scalar")


def _comparable(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def test_an_inference_tensor_comes_back(tmp_store: Path) -> None:
    with bench(tmp_store) as b:
        with torch.inference_mode():
            kept = b.store.save("a", [values(0)])
            b.store.enforce_budget()
        assert b.num_spilled == 1
        assert kept.is_unchanged
        assert torch.equal(kept.load()[0], values(0))


def test_what_the_user_or_a_module_owns_is_left_alone() -> None:
    cpu, large = torch.device("cpu"), torch.randn(MIN_NBYTES)
    assert can_save(large, cpu)
    assert can_save(large[:1], cpu)
    weight = nn.Parameter(large)
    others = [weight, weight[1:], weight.view(2, -1), large.clone().requires_grad_(), large[:0], torch.randn(10)]
    others += [large.to_sparse(), torch.randn(MIN_NBYTES, dtype=torch.complex64).conj(), large.to("meta")]
    assert not any(can_save(x, cpu) for x in others)


def test_a_change_in_place_is_noticed_wherever_the_values_are(tmp_store: Path) -> None:
    with bench(tmp_store, budget=0) as b:
        held, view_of = values(0), values(1)
        view = view_of[:]
        frames = [b.store.save("a", [held]), b.store.save("a", [view]), b.store.save("a", [values(2)])]
        del view
        b.store.enforce_budget()
        held.add_(1)
        view_of.add_(1)
        assert [f.is_unchanged for f in frames] == [False, False, True]


def test_a_change_after_the_values_were_spilled_is_noticed(tmp_store: Path) -> None:
    with bench(tmp_store, budget=0) as b:
        x = values(0)
        kept = b.store.save("a", [x])
        entry = kept.inputs[0]
        b.store._uncounted.clear()
        b.store._write_out(entry)
        assert kept.is_unchanged
        x.add_(1)
        assert not kept.is_unchanged


# -- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 3 * NBYTES])
def test_the_next_frame_is_read_before_it_is_needed(tmp_store: Path, budget: int) -> None:
    with bench(tmp_store, budget=budget, num_buffers=12) as b:
        frames = keep(b, *range(8))
        b.wait_for_writes()
        with Events() as log:
            load_in_reverse(frames, *range(8))
        events = log.found
        for seed in range(4):
            # With room for it, already when the one before is still to be loaded.
            before = seed + 1 if budget else seed
            assert events.index(f"preload unit {seed}") < events.index(f"load unit {before}")


def test_frames_of_the_first_of_two_forwards_are_needed_last(tmp_store: Path) -> None:
    with bench(tmp_store, budget=NBYTES) as b:
        first, second = keep(b, 0, 1, 2), keep(b, 3, 4, 5)
        load_in_reverse(first, 0, 1, 2)  # its backward comes first all the same
        load_in_reverse(second, 3, 4, 5)
        b.assert_all_returned()


def test_one_buffer_is_enough(tmp_store: Path) -> None:
    with bench(tmp_store, budget=0, num_buffers=1) as b:
        frames = keep(b, *range(4))
        assert torch.equal(frames[1].load()[0], values(1))  # out of order: takes the buffer from what was read ahead
        load_in_reverse(frames, *range(4))
        b.assert_all_returned()


def test_reading_waits_for_the_write(tmp_store: Path) -> None:
    slow = When(Fault(delay_s=0.05), is_write=True)
    with faulty(tmp_store, slow, budget=0, num_buffers=12) as b:
        frames = keep(b, 0, 1)
        load_in_reverse(frames, 0, 1)


def test_space_is_not_lent_again_while_a_write_to_it_is_in_flight(tmp_store: Path) -> None:
    hold = When(Fault(hold=True), is_write=True, nth=0)
    with faulty(tmp_store, hold, budget=0, num_buffers=24) as b:
        keep(b, 0)  # dropped at once, its first piece still to be written
        second = keep(b, 1)
        assert b.in_use_nbytes == 2 * NBYTES
        b.engine.release()  # type: ignore[attr-defined]
        load_in_reverse(second, 1)
        b.assert_all_returned()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_order_values_are_right(tmp_store: Path, seed: int) -> None:
    """Frames come, are asked for and go in any order, over a disk that is late now and then."""
    rng = random.Random(seed)
    streams = OffHost() if seed % 3 == 2 else None
    late = [When(Fault(delay_s=0.003), nth=n) for n in rng.sample(range(400), 60)]
    budget = rng.choice([0, NBYTES, 3 * NBYTES, 10 * NBYTES])
    options = {"budget": budget, "num_buffers": rng.choice([1, 2, 8]), "streams": streams}
    with faulty(tmp_store, *late, verify=True, **options) as b:
        shared = values(999)
        frames: list[tuple[FrameInputs, list[int]]] = []
        for turn in range(80):
            b.store.enforce_budget()
            what = rng.random()
            if what < 0.45:
                seeds = [rng.randrange(turn + 1) for _ in range(rng.randrange(3))]
                given = [values(n, rng.choice([5_000, NUMEL])) for n in seeds]
                kept = b.store.save(f"unit {turn}", [shared, *given])
                frames.append((kept, [x.numel() * 1000 + n for n, x in zip(seeds, given, strict=True)]))
                del given, kept
            elif what < 0.85 and frames:
                kept, codes = frames[-1] if rng.random() < 0.7 else rng.choice(frames)
                loaded = kept.load()
                assert torch.equal(loaded[0], values(999))
                for code, x in zip(codes, loaded[1:], strict=True):
                    assert torch.equal(x, values(code % 1000, code // 1000))
                del loaded, kept
            elif what < 0.95 and frames:
                frames.pop(rng.choice([-1, rng.randrange(len(frames))]))
            elif what < 0.97:
                b.store.abort()
            elif turn > 40:
                shared = values(999)  # the caller has forgotten the one before
            assert b.held_nbytes <= budget
        frames.clear()
        del shared
        b.assert_all_returned()


def test_spill_files_join_what_is_free_and_use_disks_in_turn(tmp_store: Path) -> None:
    for name in ("a", "b"):
        (tmp_store / name).mkdir()
    folders = [Folder.open(str(tmp_store / name)) for name in ("a", "b")]
    files = SpillFiles([Scratch(folder, False, Patience(60)) for folder in folders], "x")
    try:
        taken = [files.take(BUFFER_NBYTES, "unit") for _ in range(8)]
        assert {extent.file.path.split("/")[-2] for extent in taken} == {"a", "b"}
        assert not any((tmp_store / name / "x-0000.spill").exists() for name in ("a", "b"))
        for extent in taken[::2] + taken[1::2]:
            files.give_back(extent)
        whole = [files.take(spill.MIN_FILE_NBYTES, "unit") for _ in range(2)]
        assert disk_nbytes(files) == in_use_nbytes(files) == 2 * spill.MIN_FILE_NBYTES
        assert all(extent.offset == 0 for extent in whole)
        assert files.take(1, "unit").nbytes == 4096
        assert disk_nbytes(files) == 3 * spill.MIN_FILE_NBYTES
    finally:
        files.close()
        for folder in folders:
            folder.close()
