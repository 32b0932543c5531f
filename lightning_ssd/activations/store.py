"""Saves the inputs of modules that will be recomputed: in memory up to a budget, beyond it on disk.

[Note: saved inputs] Of each frame the values of its large inputs are saved here, not the tensors. An input counts
against the budget once nobody else holds its memory: writing what the caller or autograd holds anyway would free
nothing. Over the budget, the inputs that backward needs last are written, so the oldest first. A recomputed frame
gets tensors with the same values, strides and alignment, and by then the reads for the frames below it have started.
The memory in use is at most the budget, the pool, and the inputs of the frame in work.

Inputs on a device stay there while there is room, [Note: inputs on a device]; then they count by their copy on the
host. The copy back for one frame is started when the frame before it is loaded.
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

from lightning_ssd.activations.device_inputs import DeviceInputs, DeviceRoom
from lightning_ssd.activations.reload import Reloader
from lightning_ssd.activations.saved_input import SavedInput, can_save, key_of
from lightning_ssd.activations.spill_files import Extent, SpillFiles
from lightning_ssd.activations.spill_io import SpillIO
from lightning_ssd.activations.spill_state import HostBuffer, SpillState
from lightning_ssd.device.streams import Event, Streams
from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.io.engine import Engine
from lightning_ssd.memory.budget import SharedBudget
from lightning_ssd.memory.pool import Pool
from lightning_ssd.trace.recorder import Lane, Trace

FRAMES_AHEAD = 2
"""Frames whose inputs are read ahead."""


class FrameInputs:
    """The inputs of one frame. Their values are saved as long as this object lives.

    Attributes:
        number: Frames of later forwards have higher ones.
        inputs: One for each tensor, in the order given.
    """

    def __init__(self, store: ActivationStore, number: int, inputs: list[SavedInput]) -> None:
        self._store = store
        self.number = number
        self.inputs = inputs

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has changed one of the tensors in place since they were saved."""
        return all(saved.is_unchanged for saved in self.inputs)

    def load(self) -> list[Tensor]:
        """Tensors with the values, sizes and strides of those that were saved, without gradient history.

        Raises:
            IOFailure: The disk failed, now or when the values were written.
            CorruptionError: ``verify`` is on, and the values on disk are not those that were written.
        """
        return self._store.load(self)


class ActivationStore:
    """Saves and loads the inputs of frames; see `[Note: saved inputs]`. Safe to use from the threads of autograd.

    Args:
        engine: Moves the bytes.
        files: Disk space.
        pool: Buffers for pieces of what does not fit into the budget: one at least, two or more to overlap.
        device: Where compute runs.
        streams: Of that device.
        room: Memory of the device for inputs that stay there.
        budget: Bounds the host memory of saved inputs; without a bound nothing is written.
        piece_nbytes: Size of a piece, a multiple of 4096.
        images: Host memory within the budget that is registered with the device; None allocates it.
        verify: Compare what is read with checksums of what was written.
        trace: Gets the events ``spill``, ``preload`` and ``load``, and spans.
    """

    def __init__(
        self,
        engine: Engine,
        files: SpillFiles,
        pool: Pool,
        *,
        device: torch.device,
        streams: Streams,
        room: DeviceRoom,
        budget: SharedBudget,
        piece_nbytes: int,
        images: Pool | None = None,
        verify: bool = False,
        trace: Trace,
    ) -> None:
        self._trace = trace
        self._budget = budget
        self._streams = streams
        self._on_device = DeviceInputs(streams, room)
        self._io = SpillIO(
            engine, files, pool, images=images, streams=streams, budget=budget, verify=verify, trace=trace
        )
        self._reloader = Reloader(self._io, piece_nbytes, trace)
        self._device = device
        self._piece_nbytes = piece_nbytes
        self._lock = threading.RLock()
        self._is_closed = False
        self._numbers = itertools.count()
        self._frames: dict[int, weakref.ref[FrameInputs]] = {}  # in forward order
        self._inputs: weakref.WeakValueDictionary[tuple[object, ...], SavedInput] = weakref.WeakValueDictionary()
        self._uncounted: list[weakref.ref[SavedInput]] = []  # somebody else held their memory at the last look
        self._largest_nbytes = 0
        self._has_spilled = False
        # Finalizers append here, on any thread and at any time; the next call takes back what they name.
        self._ended_frames: deque[int] = deque()
        self._ended_states: deque[SpillState] = deque()

    def can_save(self, tensor: Tensor) -> bool:
        """Whether `save` may be given ``tensor``; the frame holds others itself."""
        return not self._is_closed and can_save(tensor, self._device)

    def save(self, unit: str, tensors: Sequence[Tensor]) -> FrameInputs:
        """Save the values that ``tensors`` have now; a tensor of several frames is saved once."""
        with self._working():
            number = next(self._numbers)
            made = self._streams.mark() if any(map(self._is_off_host, tensors)) else None
            frame = FrameInputs(self, number, [self._saved_input(unit, tensor, made) for tensor in tensors])
            self._frames[number] = weakref.ref(frame, lambda _: self._ended_frames.append(number))
            return frame

    def enforce_budget(self) -> None:
        """Write inputs until the rest is within the budget; to be called before compute takes more memory.

        Raises:
            IOFailure: A write failed, this one or an earlier one; names the unit and the file.
        """
        with self._working():
            self._count_inputs()
            limit, io = self._budget.saved_inputs_limit_nbytes, self._io
            if limit is None:
                return
            self._has_spilled |= self._staying_nbytes > limit
            while self._staying_nbytes > limit - self._slack_nbytes and self._evict_one():
                pass
            while self._budget.held_saved_inputs_nbytes > limit and io.finish_counted_write():
                pass

    def _is_off_host(self, tensor: Tensor) -> bool:
        return self._streams.is_off_host(tensor.device)

    def _saved_input(self, unit: str, tensor: Tensor, made: Event | None) -> SavedInput:
        key = key_of(tensor)
        saved = self._inputs.get(key)
        if saved is not None:
            saved.is_shared = True
            return saved
        saved = self._inputs[key] = SavedInput(unit, tensor, made if self._is_off_host(tensor) else None)
        weakref.finalize(saved, self._ended_states.append, saved.state).atexit = False
        self._uncounted.append(weakref.ref(saved))
        return saved

    def _count_inputs(self) -> None:
        """Count inputs that nobody else holds any more; those on a device leave it, or stay and do not count."""
        refs, self._uncounted = self._uncounted, []
        on_device: list[tuple[SavedInput, int]] = []
        for ref in refs:
            saved = ref()
            if saved is None:
                continue
            num_ours = self._num_ours(saved)
            if saved.num_holders > num_ours:
                self._uncounted.append(ref)
                continue
            self._largest_nbytes = max(self._largest_nbytes, saved.layout.aligned_nbytes)
            nbytes = saved.values.untyped_storage().nbytes() // num_ours
            if self._is_off_host(saved.values):
                on_device.append((saved, nbytes))
            else:
                saved.state.counted_nbytes = nbytes
                self._budget.held_saved_inputs_nbytes += nbytes
        for saved in self._on_device.add(on_device, self._evict_from_device):
            self._copy_to_host(saved)

    def _num_ours(self, saved: SavedInput) -> int:
        """Saved inputs that view the storage of ``saved``, itself included: such as two halves of one tensor."""
        if saved.num_holders == 1:
            return 1
        return sum(s.has_values and s.storage.cdata == saved.storage.cdata for s in self._inputs.values())

    def _evict_from_device(self) -> bool:
        """Let the input go that is needed last of those that stay on the device; False if there is none."""
        saved = next((s for s in reversed(self._by_need()) if s.has_values and s.state.device_nbytes), None)
        if saved is None:
            return False
        self._copy_to_host(saved)
        return True

    def _copy_to_host(self, saved: SavedInput) -> None:
        layout, io = saved.layout, self._io
        buffer = io.try_counted_buffer(layout.aligned_nbytes)
        while buffer is None and (self._evict_one() or io.finish_counted_write() or io.finish_copy()):
            buffer = io.try_counted_buffer(layout.aligned_nbytes)
        if buffer is None:
            self._write_out(saved)
            return
        data = layout.bytes_of(saved.values)
        self._on_device.leave(data, self._fill(buffer, 0, saved, data))
        saved.state.host_copy = buffer
        self._drop_values(saved)

    @property
    def _staying_nbytes(self) -> int:
        """Counted memory that is not being written."""
        return self._budget.held_saved_inputs_nbytes - self._io.writing_nbytes

    @property
    def _slack_nbytes(self) -> int:
        """Budget kept free for one input being made and one being written, so that compute does not wait for the disk.

        None until the budget was exceeded once: it may be enough.
        """
        slack = 2 * self._largest_nbytes
        return slack if self._has_spilled and 2 * slack <= (self._budget.saved_inputs_limit_nbytes or 0) else 0

    def _evict_one(self) -> bool:
        """Free the memory of the input that is needed last, or start to; False if there is none."""
        for saved in reversed(self._by_need()):
            state = saved.state
            if state.host_copy is not None and state.host_copy_read is None:
                if state.extent is None:
                    self._write_out(saved)
                else:  # it is on disk too
                    self._io.release_host_copy(state)
                return True
            if saved.has_values and state.counted_nbytes:
                self._write_out(saved)
                return True
        return False

    def _write_out(self, saved: SavedInput) -> None:
        """Start to write ``saved``, and drop its values."""
        state = saved.state
        self._trace.mark("spill", saved.unit)
        extent = self._io.take_extent(saved.layout.aligned_nbytes, saved.unit)
        try:
            if state.host_copy is not None:
                buffer, state.host_copy = state.host_copy, None
                with self._trace.label("spill", saved.unit):
                    self._io.write(extent, 0, buffer)
            else:
                with self._trace.span(Lane.COPY, "spill", saved.unit):
                    self._write_values(saved, extent)
                self._drop_values(saved)
        except BaseException:
            self._io.give_back_extent(extent)
            raise
        state.extent = extent

    def _write_values(self, saved: SavedInput, extent: Extent) -> None:
        layout, io = saved.layout, self._io
        nbytes, data = layout.aligned_nbytes, layout.bytes_of(saved.values)
        buffer = io.try_counted_buffer(nbytes)
        while buffer is None and self._slack_nbytes and io.finish_counted_write():
            buffer = io.try_counted_buffer(nbytes)
        copied: Event | None = None
        try:
            if buffer is not None:
                copied = self._fill(buffer, 0, saved, data)
                io.write(extent, 0, buffer)
                return
            for begin in range(0, nbytes, self._piece_nbytes):
                piece = io.pool_buffer(min(self._piece_nbytes, nbytes - begin), saved.unit)
                copied = self._fill(piece, begin, saved, data)
                io.write(extent, begin, piece)
        finally:
            self._on_device.leave(data, copied)

    def _fill(self, buffer: HostBuffer, begin: int, saved: SavedInput, data: Tensor) -> Event | None:
        """Start to copy a part of ``data``, what is stored of ``saved``, to the host; returns the end of the copy."""
        made = None if saved.layout.is_packed else saved.made  # what is packed was made just now
        buffer.fill(begin, data, saved.layout.begin, self._streams, made)
        return buffer.copied

    def _drop_values(self, saved: SavedInput) -> None:
        self._budget.held_saved_inputs_nbytes -= saved.state.counted_nbytes
        self._on_device.end(saved.state)
        saved.drop_values()

    def load(self, frame: FrameInputs) -> list[Tensor]:
        """See `FrameInputs.load`. Starts to read what the frames below will need."""
        with self._working():
            values = [
                self._reloader.load(saved, again=saved.is_shared and self._is_below(frame.number, saved))
                for saved in frame.inputs
            ]
            self._read_ahead(frame.number)
            return values

    def _read_ahead(self, number: int) -> None:
        below = [n for n in reversed(self._frames) if n < number]
        frames = [self._frames[n]() for n in below[:FRAMES_AHEAD]]
        for saved in frames[0].inputs if frames and frames[0] is not None else ():
            self._reloader.reload_ahead(saved)
        for frame in frames:
            if frame is not None and not all([self._reloader.read_ahead(saved) for saved in frame.inputs]):
                return

    def _by_need(self) -> list[SavedInput]:
        """Inputs of frames that wait for backward, the first that it needs first."""
        found: dict[SavedInput, None] = {}
        for ref in reversed(self._frames.values()):
            frame = ref()
            if frame is not None:
                found.update(dict.fromkeys(saved for saved in frame.inputs if saved not in found))
        return list(found)

    def _is_below(self, number: int, saved: SavedInput) -> bool:
        """Whether ``saved`` is an input of a frame before ``number`` too."""
        frames = (ref() for n, ref in self._frames.items() if n < number)
        return any(saved in frame.inputs for frame in frames if frame is not None)

    def abort(self) -> None:
        """A step failed: abandon what was read ahead. Values stay saved for as long as their frames live."""
        with self._lock:
            for ref in self._frames.values():
                frame = ref()
                for saved in frame.inputs if frame is not None else ():
                    self._reloader.abandon(saved.state)

    def close(self) -> None:
        """Wait for the disk and free its space; what is on it cannot be loaded any more. May be called again."""
        with self._lock:
            if self._is_closed:
                return
            self.abort()
            self._is_closed = True
            self._on_device.close()
            self._io.close()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Around every call: one thread at a time, no autograd, and what ended since the last call is taken back."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._is_closed:
                raise SSDOffloadError("backward needs inputs that went when the session ended; run the forward again")
            self._collect()
            yield

    def _collect(self) -> None:
        """Take back memory and disk space of frames that are gone."""
        while self._ended_frames:
            self._frames.pop(self._ended_frames.popleft())
        while self._ended_states:
            state = self._ended_states.popleft()
            self._budget.held_saved_inputs_nbytes -= state.counted_nbytes
            self._on_device.end(state)
            self._reloader.abandon(state)
            self._io.release_host_copy(state)
            if state.extent is not None:
                self._io.give_back_extent(state.extent)
        self._io.collect()
