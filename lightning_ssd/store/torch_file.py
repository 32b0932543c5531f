"""Torch files that anybody may have written: each is checked before it is loaded, by reading it without running it.

``torch.load(weights_only=True)`` runs no code of a file, but it takes the memory that the file asks for: an entry that
is compressed, a ``bytearray`` or a tensor of a made-up size. And a key of tuples within tuples ends the interpreter.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.safe_open import open_regular
from lightning_ssd.sizes import MiB

_LOCAL = b"PK\x03\x04"
_END = b"PK\x05\x06"
_END_NBYTES = 22
_LOCAL_NBYTES = 30
_ENCRYPTED = 1
_MAX_DEPTH = 200
_TAKES_MEMORY = re.compile(r"(torch(\.\w+)*) \w*(Tensor|Storage)")
_BYTEARRAY = ("builtins bytearray", "__builtin__ bytearray")
_REBUILD_ANY = "torch._tensor _rebuild_from_type_v2"
_BAD_ZIP = (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error, OverflowError, EOFError)


def load_pickle(path: str, where: str, weights_only: bool) -> dict[str, Any]:
    """Load a torch file that holds a dictionary; its tensors lie in the mapped file.

    Raises:
        CheckpointError: If it is no such file, or names a class that is not allowed.
    """
    loaded = load_any(path, where, weights_only)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{where} holds a {type(loaded).__name__}, not a dictionary")
    return loaded


def load_any(path: str | IO[bytes], where: str, weights_only: bool) -> Any:
    """As `load_pickle`, whatever the file holds; from an open file, tensors are read instead of mapped."""
    if isinstance(path, str):
        with open_regular(path, where) as file:
            return _load_open(file, f"/proc/self/fd/{file.fileno()}", where, weights_only)
    return _load_open(path, path, where, weights_only)


def _load_open(file: IO[bytes], source: str | IO[bytes], where: str, weights_only: bool) -> Any:
    check_torch_file(file, where, is_trusted=not weights_only)
    nbytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    found = _load_checked(source, where, weights_only)
    check_tensors(found, nbytes, where)
    return found


def _load_checked(path: str | IO[bytes], where: str, weights_only: bool) -> Any:
    try:
        with torch.inference_mode(False):
            return torch.load(path, map_location="cpu", mmap=isinstance(path, str), weights_only=weights_only)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|class (\S+)", str(error))
        what = (found[1] or found[2]) if found else "something beside tensors and plain values"
        raise CheckpointError(
            f"{where} holds {what}, which is not loaded from files one may not trust. If you trust this file, "
            f"pass weights_only=False, or allow the class with torch.serialization.add_safe_globals([...])"
        ) from error
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # a pickle that means harm can make the unpickler fail in any way
        raise CheckpointError(f"{where} cannot be read as a torch file: {type(error).__name__}: {error}") from error


def check_torch_file(file: IO[bytes], where: str, *, is_trusted: bool = False) -> None:
    """Refuse a file whose reading would take more memory than it has bytes, or end the interpreter.

    Args:
        file: The open file; left at its beginning.
        where: What messages call it.
        is_trusted: Its pickle may do what it likes.

    Raises:
        CheckpointError: If it is no zip archive as ``torch.save`` writes it, or its pickle asks for more than it holds.
    """
    if file.read(len(_LOCAL)) != _LOCAL:
        raise _refusal(where, "it is no zip archive; load it with torch.load and save it again with torch.save")
    try:
        file.seek(-_END_NBYTES, io.SEEK_END)
        is_plain = file.read(len(_END)) == _END  # else there is more than one place where a reader may see the end
        archive = zipfile.ZipFile(file)
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    except _BAD_ZIP as error:
        raise _refusal(where, f"{type(error).__name__}: {error}") from error
    names = {entry.filename.lower() for entry in entries}  # torch's reader knows no case
    if not is_plain or archive.comment or not entries or entries[0].header_offset or len(names) < len(entries):
        raise _refusal(where, "its zip archive is not as torch.save writes it")
    _check_entries(entries, archive.start_dir, where)
    if any(name.endswith("constants.pkl") for name in names):
        raise _refusal(where, "it is a TorchScript archive")
    if not is_trusted:
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                check_pickle(_content(file, entry), where)
    file.seek(0)


def _check_entries(entries: list[zipfile.ZipInfo], end: int, where: str) -> None:
    position = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise _refusal(where, f"its entry {entry.filename!r:.200} is compressed; save it again with torch.save")
        if entry.flag_bits & _ENCRYPTED or entry.header_offset < position:
            raise _refusal(where, f"its entry {entry.filename!r:.200} is encrypted, or overlaps another one")
        position = entry.header_offset + _LOCAL_NBYTES + entry.compress_size
    if position > end:
        raise _refusal(where, "its entries do not fit into it")


def _content(file: IO[bytes], entry: zipfile.ZipInfo) -> bytes:
    """The bytes of an entry that is stored as it is, as torch's reader finds them."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_NBYTES)
    name_nbytes, extra_nbytes = struct.unpack_from("<HH", header.ljust(_LOCAL_NBYTES, b"\0"), 26)
    file.seek(name_nbytes + extra_nbytes, io.SEEK_CUR)
    return file.read(entry.file_size)


@dataclass(frozen=True, slots=True)
class _Item:
    """What is known of an object: how deep tuples lie in it, which global it is, what is in it if it is a tuple."""

    depth: int = 0
    name: str = ""
    parts: tuple[_Item, ...] | None = None


_ANY = _Item()
_TEXT = _Item(name="text")
_EMPTY = _Item(parts=())
_MARK = _Item(name="mark")
_IS_TEXT = (pickletools.pystring, pickletools.pyunicode, pickletools.pybytes, pickletools.pybytes_or_str)


def check_pickle(data: bytes, where: str) -> None:
    """Refuse a pickle that nests tuples too deep, has places in its memo for more than it holds, or asks for memory.

    Raises:
        CheckpointError: If it does, or is none.
    """
    stack: list[_Item] = []
    memo: dict[int, _Item] = {}
    try:
        for opcode, argument, position in pickletools.genops(data):
            name = opcode.name
            if name == "MARK":
                stack.append(_MARK)
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name.endswith("PUT"):
                number = int(argument or 0)
                # Readers in C keep a list as long as the highest number.
                if number > (position or 0):
                    raise _refusal(where, f"its pickle numbers an object {number}")
                memo[number] = stack[-1]
            elif name.endswith("GET"):
                stack.append(memo[int(argument or 0)])
            elif name == "DUP":
                stack.append(stack[-1])
            else:
                stack += _result(opcode, argument, _taken(opcode, stack), where)
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # UnicodeDecodeError is a ValueError
        raise _refusal(where, f"its pickle is malformed: {error}") from error


def _taken(opcode: pickletools.OpcodeInfo, stack: list[_Item]) -> list[_Item]:
    """Take from the stack what an opcode takes."""
    before = opcode.stack_before
    number = len(before)
    if pickletools.markobject in before:
        mark = len(stack) - 1
        while stack[mark] is not _MARK:
            mark -= 1
            if mark < 0:
                raise IndexError("no mark")
        number = len(stack) - mark + before.index(pickletools.markobject)
    if number > len(stack):
        raise IndexError("an empty stack")
    begin = len(stack) - number
    taken = stack[begin:]
    del stack[begin:]
    return taken


def _result(opcode: pickletools.OpcodeInfo, argument: Any, taken: list[_Item], where: str) -> list[_Item]:
    """What an opcode puts on the stack."""
    name, after = opcode.name, opcode.stack_after
    if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"):
        parts = tuple(item for item in taken if item is not _MARK)
        depth = 1 + max((part.depth for part in parts), default=0)
        if depth > _MAX_DEPTH:
            raise _refusal(where, f"its pickle nests tuples more than {_MAX_DEPTH} deep")
        return [_Item(depth, parts=parts)]
    if name == "GLOBAL":
        return [_Item(name=argument)]
    if name == "EMPTY_TUPLE":
        return [_EMPTY]
    if name in ("REDUCE", "NEWOBJ"):
        function, arguments = taken
        _check_call(function, arguments, where)
        # A torch.Size is a tuple; bytes are written as text that is encoded.
        return [_TEXT if function.name == "_codecs encode" else _Item(arguments.depth)]
    return [_TEXT if kind in _IS_TEXT else _ANY for kind in after]


def _check_call(function: _Item, arguments: _Item, where: str) -> None:
    called, parts = function.name, arguments.parts
    if called == _REBUILD_ANY and not (parts and parts[0].name.startswith("torch._utils _rebuild")):
        raise _refusal(where, "its pickle makes a tensor by something else than what rebuilds tensors")
    is_of_text = parts is not None and all(part.name == _TEXT.name for part in parts)
    if _TAKES_MEMORY.fullmatch(called) or (called in _BYTEARRAY and not is_of_text):
        raise _refusal(where, f"its pickle asks for memory by {called.replace(' ', '.')!r:.200}")


def check_tensors(content: object, nbytes: int, where: str) -> None:
    """Refuse tensors that show more than the file holds, such as one number repeated a billion times, or nothing.

    Raises:
        CheckpointError: If there is one.
    """
    for tensor in _tensors(content):
        if tensor.is_meta:
            raise CheckpointError(f"{where} holds a tensor of shape {list(tensor.shape)} without values")
        if tensor.layout == torch.strided and tensor.numel() * tensor.element_size() > max(nbytes, MiB):
            raise CheckpointError(
                f"{where} of {nbytes} bytes holds a tensor of shape {list(tensor.shape)}, which repeats what is there"
            )


def _tensors(content: object) -> Iterator[Tensor]:
    """All tensors in dictionaries, lists and tuples; each container once."""
    seen: set[int] = set()  # everything stays alive meanwhile
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)


def _refusal(where: str, why: str) -> CheckpointError:
    return CheckpointError(f"{where} cannot be read as a torch file: {why}")
