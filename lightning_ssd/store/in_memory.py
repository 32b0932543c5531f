"""Kinds of units that stay in host memory instead of files.

[Note: in memory] What the plan keeps in memory has no file while it is used. An update changes the memory in place, and
the new generation is the same memory. A file of it is written when somebody needs one: a checkpoint, a mapping, the end
of the run. So with enough memory no step touches the disk, and all other code works on files.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_ssd.store.generation import Generation
from lightning_ssd.store.generation_files import GenerationFiles
from lightning_ssd.store.layout import UnitLayout
from lightning_ssd.store.staging import Source, Staging


class InMemoryKinds:
    """Which kinds of which units are in memory, and their tensors.

    Args:
        files: Files of generations.
        staging: Writes and reads them.
    """

    def __init__(self, files: GenerationFiles, staging: Staging) -> None:
        self._files = files
        self._staging = staging
        self._tensors: dict[tuple[str, str], tuple[Tensor, ...]] = {}  # by unit and kind

    def tensors(self, unit: str, kind: str) -> tuple[Tensor, ...] | None:
        """The tensors of a kind of a unit, one per parameter in file order; None if it is not in memory."""
        return self._tensors.get((unit, kind))

    def hold(self, layout: UnitLayout, tensors: Sequence[Tensor], current: Generation | None) -> None:
        """From now on keep a kind of a unit in ``tensors``.

        Args:
            layout: Unit and kind.
            tensors: Contiguous, one per parameter.
            current: Its values are read into ``tensors``; with None they keep what they hold.

        Raises:
            IOFailure: The disk failed.
        """
        if current is not None:
            self._staging.read(current, tensors)
            current.in_memory = tuple(tensors)
        self._tensors[layout.unit, layout.kind] = tuple(tensors)

    def replace(self, layout: UnitLayout, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See `StateStore.adopt`."""
        self._tensors[layout.unit, layout.kind] = found = tuple(tensors)
        return found

    def begin(self, layout: UnitLayout) -> Generation | None:
        """A new generation in the same memory, to be changed in place; None if the kind is not in memory."""
        tensors = self.tensors(layout.unit, layout.kind)
        return None if tensors is None else Generation(layout, None, tensors)

    def write(self, layout: UnitLayout, source: Source) -> Generation | None:
        """The same, with the values of ``source``."""
        tensors = self.tensors(layout.unit, layout.kind)
        if tensors is None:
            return None
        for index, tensor in enumerate(tensors):
            found = source(index)
            tensor.zero_() if found is None else tensor.copy_(found.detach().reshape(tensor.shape))
        return Generation(layout, None, tensors)

    def write_file(self, generation: Generation) -> None:
        """Write a file of the values in memory, unless there is one.

        Raises:
            StoreError: The disk is full.
            IOFailure: The disk failed.
        """
        if generation.in_memory is not None and not generation.has_file:
            written = self._staging.write(generation.layout, generation.in_memory.__getitem__)
            generation.file, generation.checks = written.file, written.checks

    def drop_file(self, generation: Generation) -> None:
        """Retire the file of values in memory that were changed since it was written."""
        if generation.in_memory is not None and generation.has_file:
            self._files.retire(generation)
            generation.detach()

    def clear(self) -> None:
        """Nothing is in memory any more."""
        self._tensors.clear()
