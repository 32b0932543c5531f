"""A checkpoint as a folder of ``torch.distributed.checkpoint``, laid out as Lightning's sharded strategies write it.

``model`` holds the state dict, ``optimizer_0`` and so on the optimizers' states by parameter name, ``meta.pt`` what
else Lightning keeps. ``torch.distributed.checkpoint.load`` reads it with or without a process group, on any number
of ranks.
"""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from tempfile import TemporaryFile
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_ssd.checkpoint.dictionary import join_state_dict, named_optimizer_states, without_empty_loader_states
from lightning_ssd.checkpoint.directory import sync_directory
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.writer import FLUSH_NBYTES, Progress, StreamWriter, new_file, write_pickle
from lightning_ssd.convert.dcp import META
from lightning_ssd.convert.export import (
    ExportReport,
    ReadPages,
    Spill,
    mapped_state_dict,
    new_folder_path,
    os_errors,
    without_decoded,
)
from lightning_ssd.convert.export_staging import publish, staged_folder
from lightning_ssd.errors import CheckpointError


def to_dcp(
    directory: str | os.PathLike[str],
    out_folder: str | os.PathLike[str],
    *,
    weights_only: bool | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the folder; tensors go from the mapped files to it, one after the other.

    Args:
        directory: The checkpoint.
        out_folder: Where; must not exist, or be empty.
        weights_only: False if the state holds classes of your own; see `CheckpointReader.state`.
        progress: Called with bytes done and bytes in all.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or the folder not be written.
    """
    target = new_folder_path(out_folder)
    with ExitStack() as stack:
        reader = stack.enter_context(CheckpointReader(directory))
        reader.verify_files()
        stack.enter_context(os_errors(target))
        folder = stack.enter_context(staged_folder(target))
        inside = f"/proc/self/fd/{folder.fd}"  # the folder that was made, whatever has its path by now
        spill = Spill(stack.enter_context(TemporaryFile(dir=inside)).fileno())
        content, meta = _content(reader, spill, weights_only)
        _write(inside, content, ReadPages(reader, spill, progress))
        with new_file(os.path.join(folder.path, META), folder) as fd:
            writer = StreamWriter(fd)
            write_pickle(writer, meta)
            writer.finish()
        names = folder.names()
        for name in names:
            os.chmod(name, 0o600, dir_fd=folder.fd)
        nbytes = sum(folder.stat(name).st_size for name in names)
        folder.sync()
        publish(folder, target)
        sync_directory(os.path.dirname(target))
    return ExportReport(tuple(os.path.join(target, name) for name in names), nbytes)


def _content(
    reader: CheckpointReader, spill: Spill, weights_only: bool | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and optimizers, and what else Lightning keeps."""
    meta = reader.state(weights_only)
    meta = without_empty_loader_states(meta)
    join_state_dict(meta, mapped_state_dict(reader, spill, weights_only))
    if "optimizer_states" in meta:
        raise CheckpointError(
            f"{reader.directory}: a hook changed its optimizer_states when it was saved, so they are not known by "
            "name; export it to a .ckpt instead"
        )
    states = enumerate(without_decoded(named_optimizer_states(reader, weights_only), spill))
    return {"model": meta.pop("state_dict", {}), **{f"optimizer_{index}": state for index, state in states}}, meta


def _write(folder: str, content: dict[str, Any], pages: ReadPages) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group is meant
        save(content, storage_writer=FileSystemWriter(folder), planner=_Planner(pages))


class _Planner(DefaultSavePlanner):
    """Gives back the memory of tensors that were written."""

    def __init__(self, pages: ReadPages) -> None:
        super().__init__()
        self._pages = pages
        self._nbytes = 0
        self._flushed_nbytes = 0

    def resolve_data(self, write_item: Any) -> Any:
        """The data of one item, which is written before the next one is asked for."""
        if self._nbytes - self._flushed_nbytes >= FLUSH_NBYTES:
            self._pages.drop(self._nbytes)
            self._flushed_nbytes = self._nbytes
        found = super().resolve_data(write_item)
        self._nbytes += getattr(found, "nbytes", 0)
        return found
