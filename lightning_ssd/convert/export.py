"""Export a checkpoint as one Lightning ``.ckpt`` or as a Hugging Face folder.

Tensors are written from the mapped files in pieces, and their pages are dropped afterwards: host memory does not grow
with the model.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_ssd.checkpoint.dictionary import dictionary_of, without_empty_loader_states
from lightning_ssd.checkpoint.directory import check_replaceable, is_checkpoint, sync_directory
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.state_dict import VALUE_KINDS, StateDictView, valued
from lightning_ssd.checkpoint.writer import (
    Progress,
    StreamWriter,
    as_bytes,
    lay_out,
    new_file,
    write_pickle,
    write_tensors,
)
from lightning_ssd.convert.export_staging import publish, staged_file, staged_folder
from lightning_ssd.convert.shards import HF_INDEX, Shard, attribute_of_all, cut_shards, index_text, pretrained_names
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.folder import Folder
from lightning_ssd.sizes import parse_nbytes, round_up
from lightning_ssd.store.decoded import DecodedTensor, values_of
from lightning_ssd.store.mapped_safetensors import drop_pages, map_bytes
from lightning_ssd.store.strides import flatten, stride_of, unflatten

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json", ".h5", ".msgpack", ".gguf")


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        files: Paths of the written weight files.
        nbytes: Their bytes.
        left_out: Names of tensors that do not begin with ``prefix`` and were not exported.
        prefix: What the names in a folder have no more.
    """

    files: tuple[str, ...]
    nbytes: int
    left_out: tuple[str, ...] = ()
    prefix: str = ""


def consolidate(
    directory: str | os.PathLike[str],
    out_file: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    weights_only: bool | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a single file that ``LightningModule.load_from_checkpoint`` and ``Trainer.fit(ckpt_path=...)`` read.

    Args:
        directory: The checkpoint.
        out_file: Where.
        overwrite: Replace an existing file.
        weights_only: False if the state holds classes of your own; see `CheckpointReader.state`.
        progress: Called with bytes done and bytes in all.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or the file not be written.
    """
    target = os.path.abspath(os.fspath(out_file))
    if os.path.isdir(target) or (os.path.lexists(target) and not overwrite):
        raise CheckpointError(f"{target!r} exists; choose another name, or have a file replaced with overwrite=True")
    with CheckpointReader(directory) as reader, ExitStack() as stack, os_errors(target):
        reader.verify_files()  # the export has no checksums, so damage could not be found later
        os.makedirs(os.path.dirname(target), exist_ok=True)
        spill = Spill(stack.enter_context(tempfile.TemporaryFile(dir=os.path.dirname(target))).fileno())
        content = plain_dictionary(reader, spill, weights_only)
        with staged_file(target) as (fd, take_name):
            writer = Writer(fd, ReadPages(reader, spill, progress))
            write_pickle(writer, without_empty_loader_states(content), is_result=True)
            writer.finish()
            take_name()
        sync_directory(os.path.dirname(target))
    return ExportReport((target,), writer.nbytes)


def to_safetensors(
    directory: str | os.PathLike[str],
    out_folder: str | os.PathLike[str],
    *,
    max_shard: int | str = "5GB",
    prefix_to_strip: str | None = None,
    config_from: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a folder that ``from_pretrained`` reads: one safetensors file, or shards and an index.

    The names are those that ``save_pretrained`` writes: without the LightningModule's attribute, without what
    torch.compile adds, and a tied tensor once, under its first name. If the configuration says
    ``"tie_word_embeddings": false``, it is written under each of its names.

    Args:
        directory: The checkpoint.
        out_folder: Where; must not exist, or be empty.
        max_shard: Bytes per file; a larger tensor gets a file of its own.
        prefix_to_strip: Front of the names inside the LightningModule, such as ``"model."``; tensors without it are
            left out and reported. None: the attribute that holds all parameters, if there is one and a Trainer has
            saved the checkpoint; what was imported from a Hugging Face folder has its names already.
        config_from: Folder whose other files (configuration, tokenizer) are copied along.
        progress: Called with bytes done and bytes in all.

    Raises:
        CheckpointError: If the checkpoint cannot be read, nothing has the prefix, or the folder cannot be written.
    """
    target = new_folder_path(out_folder)
    with CheckpointReader(directory) as reader, os_errors(target), staged_folder(target) as folder:
        reader.verify_files(kinds=VALUE_KINDS)
        view = StateDictView(reader)
        prefix = _attribute(reader) if prefix_to_strip is None else prefix_to_strip
        is_tied = config_from is None or _ties(os.fspath(config_from))
        written = [name for name in view if not is_tied or view.stored_name(name) == name]
        names, left_out = pretrained_names(written, prefix, reader.directory)
        sizes = {source: view.nbytes_of(source) for source in names.values()}
        shards = cut_shards(sizes, names, parse_nbytes(max_shard))
        total = _write_shards(folder, shards, view, progress)
        if config_from is not None:
            _copy_configuration(os.fspath(config_from), folder)
        folder.sync()
        publish(folder, target)
        sync_directory(os.path.dirname(target))
    files = tuple(os.path.join(target, shard.file) for shard in shards)
    return ExportReport(files, total, left_out, prefix)


def plain_dictionary(reader: CheckpointReader, spill: Spill, weights_only: bool | None) -> dict[str, Any]:
    """Lightning's dictionary with mapped tensors; those that have to be converted or decoded are in ``spill``."""
    content = dictionary_of(reader, mapped_state_dict(reader, spill, weights_only), weights_only)
    if "optimizer_states" in content:
        content["optimizer_states"] = without_decoded(content["optimizer_states"], spill)
    return content


def mapped_state_dict(reader: CheckpointReader, spill: Spill, weights_only: bool | None) -> dict[str, Tensor]:
    """All tensors of the module, mapped; names that are tied share one tensor."""
    view = StateDictView(reader, weights_only)
    stored: dict[str, Tensor] = {}
    for name in view:
        key = view.stored_name(name)
        if key in stored:
            continue
        if view.is_in_place(key):
            stored[key] = view[key]
        else:
            spill.write(key, view[key])
            view.drop(key)
    stored |= spill.map()
    return {name: stored[view.stored_name(name)] for name in view}


def without_decoded(content: Any, spill: Spill) -> Any:
    """``content`` with what would be decoded in memory when it is used in ``spill`` instead, mapped."""
    found = [leaf for leaf in tree_leaves(content) if isinstance(leaf, DecodedTensor)]
    for number, tensor in enumerate(found):
        spill.write(f"decoded {number}", tensor)
    mapped = spill.map() if found else {}
    numbers = iter(range(len(found)))
    return tree_map_only(DecodedTensor, lambda _: mapped[f"decoded {next(numbers)}"], content)


def new_folder_path(out_folder: str | os.PathLike[str]) -> str:
    """The absolute path of a folder to be written.

    Raises:
        CheckpointError: If it exists and is not empty.
    """
    target = os.path.abspath(os.fspath(out_folder))
    check_replaceable(target)
    if is_checkpoint(target) or (os.path.lexists(target) and not os.path.isdir(target)):
        raise CheckpointError(f"{target!r} exists; name a folder that does not exist or is empty")
    return target


class Spill:
    """An unnamed file for converted tensors, so that they are mapped like the others, not held in memory."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._nbytes = 0
        self._entries: list[tuple[str, int, Tensor]] = []
        self._mapped: list[npt.NDArray[np.uint8]] = []

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        os.lseek(self._fd, self._nbytes, os.SEEK_SET)
        shape, stride = tensor.shape, stride_of(tensor)
        StreamWriter(self._fd).write(as_bytes(flatten(values_of(tensor), shape, stride)))
        like = unflatten(torch.empty(tensor.numel(), dtype=tensor.dtype, device="meta"), shape, stride)
        self._entries.append((name, self._nbytes, like))
        self._nbytes += round_up(tensor.nbytes)

    def map(self) -> dict[str, Tensor]:
        """All tensors, mapped."""
        if not self._nbytes:
            return {name: torch.empty_like(like, device="cpu") for name, _, like in self._entries}
        os.ftruncate(self._fd, self._nbytes)
        mapped = map_bytes(self._fd, self._nbytes)
        self._mapped.append(mapped)
        with torch.inference_mode(False):
            return {
                name: unflatten(
                    torch.from_numpy(mapped[begin : begin + like.nbytes]).view(like.dtype), like.shape, stride_of(like)
                )
                for name, begin, like in self._entries
            }

    def drop(self) -> None:
        """Free the memory of the mapped pages."""
        for mapped in self._mapped:
            drop_pages(mapped.ctypes.data, mapped.nbytes)


class ReadPages:
    """The mapped pages that an export reads. Drops them as what was made of them is written.

    Args:
        reader: The checkpoint.
        spill: What was converted.
        progress: Called with bytes done and bytes in all.
    """

    def __init__(self, reader: CheckpointReader, spill: Spill, progress: Progress | None) -> None:
        self._reader = reader
        self._spill = spill
        self._progress = progress

    def drop(self, written_nbytes: int) -> None:
        """Free their memory, and report how many bytes are written."""
        self._reader.drop()
        self._spill.drop()
        if self._progress is not None:
            total = self._reader.manifest.nbytes
            self._progress(min(written_nbytes, total), total)


class Writer(StreamWriter):
    """Drops pages that were read together with those that were written."""

    def __init__(self, fd: int, pages: ReadPages) -> None:
        super().__init__(fd)
        self._pages = pages

    def drop(self) -> None:
        """Drop both."""
        super().drop()
        self._pages.drop(self.nbytes)


def _write_shards(folder: Folder, shards: list[Shard], view: StateDictView, progress: Progress | None) -> int:
    """Write the files, and the index of several; returns the bytes of all tensors."""
    total = sum(shard.nbytes for shard in shards)
    done = 0
    for shard in shards:
        done = _write_shard(folder, shard, view, done, total, progress)
    if len(shards) > 1:
        _write_text(folder, HF_INDEX, index_text(shards))
    return total


def _write_shard(
    folder: Folder, shard: Shard, view: StateDictView, done: int, total: int, progress: Progress | None
) -> int:
    entries = lay_out((name, view.dtype_of(source), view.shapes[source]) for name, source in shard.names.items())
    last: list[str] = []

    def tensor_of(name: str) -> Tensor:
        while last:
            view.drop(last.pop())
        if progress is not None:
            progress(done + writer.nbytes, total)
        last.append(shard.names[name])
        return view[shard.names[name]]

    with new_file(os.path.join(folder.path, shard.file), folder) as fd:
        writer = StreamWriter(fd)
        write_tensors(writer, entries, tensor_of, {"format": "pt"})
        writer.finish()
    return done + shard.nbytes


def _attribute(reader: CheckpointReader) -> str:
    """The attribute of the LightningModule that holds all parameters, with a dot; empty if there is none."""
    try:  # a Trainer saved it, or it was imported for one (``--like``)
        is_of_a_trainer = bool(reader.manifest.optimizers) or "loops" in reader.state()
    except CheckpointError:  # classes of the user's own are in the state
        is_of_a_trainer = True
    return attribute_of_all(valued(reader.manifest)) if is_of_a_trainer else ""


def _ties(config_from: str) -> bool:
    """Whether the model's configuration has ``from_pretrained`` tie what was tied."""
    path = os.path.join(config_from, "config.json")
    if not os.path.isfile(path):
        return True
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except ValueError as error:
        raise CheckpointError(f"{path!r} is no JSON: {error}") from error
    return not isinstance(config, dict) or config.get("tie_word_embeddings") is not False


def _copy_configuration(source: str, folder: Folder) -> None:
    if not os.path.isdir(source):
        raise CheckpointError(f"config_from={source!r} is not a folder")
    with os.scandir(source) as found:
        for entry in found:
            if entry.is_file() and not entry.name.endswith(_WEIGHT_SUFFIXES):
                to = os.path.join(folder.path, entry.name)
                with open(entry.path, "rb") as original, new_file(to, folder) as fd:
                    shutil.copyfileobj(original, StreamWriter(fd))


def _write_text(folder: Folder, name: str, text: str) -> None:
    with new_file(os.path.join(folder.path, name), folder) as fd:
        writer = StreamWriter(fd)
        writer.write(text.encode())
        writer.finish()


@contextmanager
def os_errors(target: str) -> Iterator[None]:
    """Turn an `OSError` into a `CheckpointError` that names the target."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target!r} could not be written: {error}") from error
