"""Keeps the inputs of blocks that will be recomputed: in memory up to a budget, past it on disk.

[Note: kept inputs] Of each frame the values of its large inputs are kept here, not the tensors. An input counts against
the budget from the moment on that nobody else holds its memory: what the caller or autograd hold anyway would not be
freed by writing it. Over the budget, those that backward needs last are written, so the oldest first. A frame that is
recomputed gets tensors with the same values, strides and place in a cache line, and the reads for the frames below it
have been started by then. Memory in use is the budget, the pool, and the frame in work.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_ssd.activations.reload import Reloader
from lightning_ssd.activations.saved_input import SavedInput, can_keep, key_of
from lightning_ssd.activations.spill_files import SpillFiles
from lightning_ssd.activations.spill_io import Slot, SpillIO, SpillState
from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.io.engine import Engine
from lightning_ssd.memory.budget import SharedBudget
from lightning_ssd.memory.pool import Pool
from lightning_ssd.sizes import MiB
from lightning_ssd.trace.recorder import Lane, Trace

BUFFER_NBYTES = 4 * MiB
FRAMES_AHEAD = 2
"""Frames whose inputs are read ahead."""


class FrameInputs:
    """The inputs of one frame; they are kept as long as this lives.

    Attributes:
        unit: The frame's unit.
        number: Frames of later forwards have higher ones.
        entries: One for each tensor, in the order given.
    """

    def __init__(self, store: ActivationStore, unit: str, number: int, entries: list[SavedInput]) -> None:
        self._store = store
        self.unit = unit
        self.number = number
        self.entries = entries

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has changed one of the tensors in place since they were given."""
        return all(entry.is_unchanged for entry in self.entries)

    def load(self) -> list[Tensor]:
        """Tensors with the values, sizes and strides of those that were given, without gradient history.

        Raises:
            IOFailure: The disk failed, then or now.
        """
        return self._store.load(self)


class ActivationStore:
    """See `[Note: kept inputs]`. Safe to use from the threads of autograd.

    Args:
        engine: Moves the bytes.
        files: Where to.
        pool: At least one buffer, for pieces of what does not fit into the budget; two or more to overlap.
        device: Where compute runs.
        budget: Bounds the host memory for saved values; without a bound nothing is written.
        buffer_nbytes: Size of a piece, a multiple of 4096.
        images: Where values that left a GPU wait: memory of the budget, not of ``pool``; None takes it from torch.
        verify: Check what is read against checksums of what was written.
        trace: Gets the events ``spill``, ``preload`` and ``load``, and spans.
    """

    def __init__(
        self,
        engine: Engine,
        files: SpillFiles,
        pool: Pool,
        *,
        device: torch.device,
        budget: SharedBudget,
        buffer_nbytes: int = BUFFER_NBYTES,
        images: Pool | None = None,
        verify: bool = False,
        trace: Trace | None = None,
    ) -> None:
        self._trace = trace or Trace()
        self._shuttle = SpillIO(engine, files, pool, images=images, budget=budget, verify=verify, trace=self._trace)
        self._reader = Reloader(self._shuttle, buffer_nbytes, self._trace, self._cancel_one)
        self._device = device
        self._buffer_nbytes = buffer_nbytes
        self._lock = threading.RLock()
        self._is_closed = False
        self._numbers = itertools.count()
        self._frames: dict[int, weakref.ref[FrameInputs]] = {}  # in forward order
        self._entries: weakref.WeakValueDictionary[tuple[object, ...], SavedInput] = weakref.WeakValueDictionary()
        self._uncounted: list[weakref.ref[SavedInput]] = []  # somebody else held their memory when we last looked
        self._largest_nbytes = 0
        self._has_spilled = False
        # Filled by whoever lets go of a frame, on any thread and at any time: worked off at the next call.
        self._ended_frames: deque[int] = deque()
        self._ended_places: deque[SpillState] = deque()

    @property
    def held_nbytes(self) -> int:
        """Host memory of the budget that kept values take now, as far as nobody else holds them."""
        return self._shuttle.held_nbytes

    # -- forward -------------------------------------------------------------------------------------------------

    def can_keep(self, tensor: Tensor) -> bool:
        """Whether `keep` may be given ``tensor``; others stay as they are."""
        return not self._is_closed and can_keep(tensor, self._device)

    def keep(self, unit: str, tensors: Sequence[Tensor]) -> FrameInputs:
        """Keep the values that ``tensors`` have now; the same tensor given again is kept once."""
        with self._working():
            number = next(self._numbers)
            kept = FrameInputs(self, unit, number, [self._entry(unit, tensor) for tensor in tensors])
            self._frames[number] = weakref.ref(kept, lambda _: self._ended_frames.append(number))
            return kept

    def settle(self) -> None:
        """Bring memory back into the budget; to be called before compute takes more.

        Raises:
            IOFailure: A write failed, this one or an earlier one; names the unit and the file.
        """
        with self._working():
            self._count()
            shuttle = self._shuttle
            budget = shuttle.budget_nbytes
            if budget is None:
                return
            self._has_spilled |= shuttle.held_nbytes - shuttle.leaving_nbytes > budget
            while shuttle.held_nbytes - shuttle.leaving_nbytes > budget - self._slack_nbytes and self._evict_one():
                pass
            while shuttle.held_nbytes > budget and shuttle.finish_leaving():
                pass

    def _entry(self, unit: str, tensor: Tensor) -> SavedInput:
        key = key_of(tensor)
        entry = self._entries.get(key)
        if entry is not None:
            entry.is_shared = True
            return entry
        entry = self._entries[key] = SavedInput(unit, tensor)
        weakref.finalize(entry, self._ended_places.append, entry.place).atexit = False
        self._uncounted.append(weakref.ref(entry))
        return entry

    def _count(self) -> None:
        """Count what nobody else holds any more, and take it off the device."""
        refs, self._uncounted = self._uncounted, []
        for ref in refs:
            entry = ref()
            if entry is None:
                continue
            num_ours = self._num_ours(entry)
            if entry.num_holders > num_ours:
                self._uncounted.append(ref)
                continue
            self._largest_nbytes = max(self._largest_nbytes, entry.form.nbytes)
            if self._shuttle.copies.is_off_host(entry.form.device):
                self._to_host(entry)
            else:
                entry.place.counted_nbytes = entry.values.untyped_storage().nbytes() // num_ours
                self._shuttle.held_nbytes += entry.place.counted_nbytes

    def _num_ours(self, entry: SavedInput) -> int:
        if entry.num_holders == 1:
            return 1
        # Two inputs may view one storage, such as halves of it.
        return sum(e.has_values and e.storage.cdata == entry.storage.cdata for e in self._entries.values())

    def _to_host(self, entry: SavedInput) -> None:
        form, shuttle = entry.form, self._shuttle
        memory = shuttle.memory(form.nbytes)
        while memory is None and (self._evict_one() or shuttle.finish_leaving()):
            memory = shuttle.memory(form.nbytes)
        if memory is None:
            self._write_out(entry)
            return
        memory.fill(0, form.bytes_of(entry.values), form.begin, shuttle.copies)
        entry.place.image = memory
        self._drop_values(entry)

    @property
    def _slack_nbytes(self) -> int:
        # Room for one image being made and one being written: then compute does not wait for the disk. Only once the
        # budget was not enough: before, the last bytes of it would be left free for nothing.
        slack = 2 * self._largest_nbytes
        return slack if self._has_spilled and 2 * slack <= (self._shuttle.budget_nbytes or 0) else 0

    # -- memory to disk ------------------------------------------------------------------------------------------

    def _evict_one(self) -> bool:
        """Free the memory of the entry that is needed last, or start to; False if there is none."""
        for entry in reversed(self._needed()):
            place = entry.place
            if place.image is not None and place.image_read is None:
                if place.slot is None:
                    self._write_out(entry)
                else:  # the disk has it
                    self._shuttle.release_image(place)
                return True
            if entry.has_values and place.counted_nbytes:
                self._write_out(entry)
                return True
        return False

    def _write_out(self, entry: SavedInput) -> None:
        place = entry.place
        self._trace.mark("spill", entry.unit)
        slot = self._shuttle.take_slot(entry.form.nbytes, entry.unit)
        try:
            if place.image is not None:
                image, place.image = place.image, None
                self._shuttle.write(slot, 0, image)
            else:
                with self._trace.span(Lane.COPY, "spill", entry.unit):
                    self._write_values(entry, slot)
                self._drop_values(entry)
        except BaseException:
            self._shuttle.give_back_slot(slot)
            raise
        place.slot = slot

    def _write_values(self, entry: SavedInput, slot: Slot) -> None:
        form, shuttle = entry.form, self._shuttle
        data = form.bytes_of(entry.values)
        memory = shuttle.memory(form.nbytes)
        while memory is None and self._slack_nbytes and shuttle.finish_leaving():
            memory = shuttle.memory(form.nbytes)
        if memory is not None:
            memory.fill(0, data, form.begin, shuttle.copies)
            shuttle.write(slot, 0, memory)
            return
        for begin in range(0, form.nbytes, self._buffer_nbytes):
            piece = shuttle.buffer(min(self._buffer_nbytes, form.nbytes - begin), entry.unit, self._cancel_one)
            piece.fill(begin, data, form.begin, shuttle.copies)
            shuttle.write(slot, begin, piece)

    def _drop_values(self, entry: SavedInput) -> None:
        self._shuttle.held_nbytes -= entry.place.counted_nbytes
        entry.drop_values()

    # -- backward ------------------------------------------------------------------------------------------------

    def load(self, kept: FrameInputs) -> list[Tensor]:
        """See `FrameInputs.load`. Starts to read what the frames below will need."""
        with self._working():
            values = [self._reader.load(e, again=e.is_shared and self._is_below(kept.number, e)) for e in kept.entries]
            self._preload(kept.number)
            return values

    def _preload(self, number: int) -> None:
        below = [n for n in reversed(self._frames) if n < number]
        for n in below[:FRAMES_AHEAD]:
            kept = self._frames[n]()
            if kept is not None and not all([self._reader.read_ahead(entry) for entry in kept.entries]):
                return

    def _cancel_one(self) -> bool:
        """Return the buffers of the entry read ahead that is needed last; False if there is none."""
        for entry in reversed(self._needed()):
            if entry.place.pieces:
                self._reader.give_up(entry.place)
                break
        return self._shuttle.drop_unwanted()

    # -- order ---------------------------------------------------------------------------------------------------

    def _needed(self) -> list[SavedInput]:
        """Entries of frames that wait for backward, those it needs first at the front."""
        found: dict[SavedInput, None] = {}
        for ref in reversed(self._frames.values()):
            kept = ref()
            if kept is not None:
                found.update(dict.fromkeys(entry for entry in kept.entries if entry not in found))
        return list(found)

    def _is_below(self, number: int, entry: SavedInput) -> bool:
        kept = (ref() for n, ref in self._frames.items() if n < number)
        return any(entry in k.entries for k in kept if k is not None)

    # -- ends ----------------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """A step failed: give up what was read ahead. Values stay for as long as their frames do."""
        with self._lock:
            for ref in self._frames.values():
                kept = ref()
                for entry in kept.entries if kept is not None else ():
                    self._reader.give_up(entry.place)

    def close(self) -> None:
        """Wait for the disk and give its space back; what is on it cannot be loaded any more. May be called again."""
        with self._lock:
            if self._is_closed:
                return
            self.abort()
            self._is_closed = True
            self._shuttle.close()

    @contextmanager
    def _working(self) -> Iterator[None]:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._is_closed:
                raise SSDOffloadError("backward needs inputs that went when the session ended; run the forward again")
            self._collect()
            yield

    def _collect(self) -> None:
        """Take back what frames that are gone had."""
        while self._ended_frames:
            self._frames.pop(self._ended_frames.popleft())
        while self._ended_places:
            place = self._ended_places.popleft()
            self._shuttle.held_nbytes -= place.counted_nbytes
            self._reader.give_up(place)
            self._shuttle.release_image(place)
            if place.slot is not None:
                self._shuttle.give_back_slot(place.slot)
        self._shuttle.collect()
