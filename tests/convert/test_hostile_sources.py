"""Folders and files of every format that can be imported, made to do harm: refused, in little memory, at once."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_ssd.convert.importing import open_source
from lightning_ssd.errors import CheckpointError
from lightning_ssd.store.torch_file import check_pickle

VALUE = {"w": torch.arange(6.0)}


def hf(folder: Path) -> Path:
    save_file(VALUE, folder / "model.safetensors")
    return folder / "model.safetensors"


def index(folder: Path) -> Path:
    save_file(VALUE, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    return folder / "model.safetensors.index.json"


def universal(folder: Path) -> Path:
    (folder / "zero" / "w").mkdir(parents=True)
    torch.save({"param": VALUE["w"]}, folder / "zero" / "w" / "fp32.pt")
    torch.save({"param": VALUE["w"]}, folder / "zero" / "w" / "exp_avg.pt")
    return folder / "zero" / "w" / "exp_avg.pt"


def dcp(folder: Path) -> Path:
    (folder / ".metadata").write_bytes(b"")
    return folder / ".metadata"


def torch_file(folder: Path) -> Path:
    torch.save(VALUE, folder / "a.pt")
    return folder / "a.pt"


def alone(folder: Path) -> Path:
    save_file(VALUE, folder / "a.safetensors")
    return folder / "a.safetensors"


FORMATS = (hf, index, universal, dcp, torch_file, alone)


def read(folder: Path, victim: Path) -> None:
    """All of a source; of a format that is one file, of that."""
    with open_source(victim if victim.parent == folder and victim.stem == "a" else folder) as source:
        for kinds in source.parameters.values():
            for held in kinds.values():
                held.load().sum()


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("what", ["FIFO", "device", "link out", "folder", "huge"])
def test_something_else_in_the_place_of_a_file(tmp_path: Path, make: Callable[[Path], Path], what: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    victim = make(folder)
    if what == "link out":
        if victim.stem == "a":
            return  # what the user names may be a symlink
        victim.rename(tmp_path / "outside")
        victim.symlink_to(tmp_path / "outside")
    else:
        victim.unlink()
        if what == "FIFO":
            os.mkfifo(victim)
        elif what == "device":
            os.symlink("/dev/zero", victim)
        elif what == "folder":
            victim.mkdir()
        else:
            victim.touch()
            os.truncate(victim, 1 << 40)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        read(folder, victim)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024  # KiB


def archive(path: Path, content: bytes, *, compression: int = zipfile.ZIP_STORED) -> Path:
    """A torch file with a pickle of our own."""
    with zipfile.ZipFile(path, "w", compression) as made:
        made.writestr("archive/data.pkl", content)
        made.writestr("archive/version", b"3\n")
        made.writestr("archive/byteorder", b"little")
    return path


def test_compressed_entries_take_no_memory(tmp_path: Path) -> None:
    bomb = b"\x80\x02}q\x00." + bytes(256 << 20)
    path = archive(tmp_path / "a.pt", bomb, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    del bomb
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"data\.pkl' is compressed"):
        open_source(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 16 * 1024  # KiB


def call(name: str, argument: bytes) -> bytes:
    return b"\x80\x02}U\x01ac" + name.encode() + b"\n" + argument + b"\x85Rs."


NUMBER = b"\x8a\x08" + struct.pack("<q", 1 << 36)
HARM = {
    "bytearray": call("builtins\nbytearray", NUMBER),
    "tensor": call("torch\nFloatTensor", NUMBER),
    "bytearray by a list": b"\x80\x02}U\x01acbuiltins\nbytearray\n]" + NUMBER + b"aRs.",
    "rebuilt": b"\x80\x02}U\x01actorch._tensor\n_rebuild_from_type_v2\n"
    b"(cbuiltins\nbytearray\ncbuiltins\nbytearray\n" + NUMBER + b"\x85NtRs.",
    "tuples": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "memo": b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b".",
    "cut": b"\x80\x02}",
    "no stack": b"\x80\x02\x87.",
    "no mark": b"\x80\x02t.",
}


@pytest.mark.parametrize("content", HARM.values(), ids=HARM)
def test_a_pickle_that_asks_for_more_than_it_holds(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".metadata").write_bytes(content)
    for path in (archive(tmp_path / "a.pt", content), tmp_path / "folder"):
        with pytest.raises(CheckpointError):
            open_source(path)


def test_what_torch_and_lightning_write_is_accepted() -> None:
    values: list[Any] = [
        {
            "a": torch.nn.Parameter(torch.ones(2)),
            "b": b"bytes",
            "c": bytearray(b"xyz"),
            "d": {1, 2},
            "e": ("f", (1, 2)),
        },
        [torch.Size([3, 4]), torch.float16, 1 + 2j, 10**100, None, True],
    ]
    for value in values:
        file = io.BytesIO()
        torch.save(value, file)
        with zipfile.ZipFile(file) as made:
            check_pickle(made.read("archive/data.pkl"), "it")
    for protocol in range(2, 6):
        check_pickle(pickle.dumps([*values[1][2:], {"k": [(1, 2)] * 3}], protocol), "it")


def test_a_number_that_is_repeated_takes_no_memory(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(1 << 34)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="repeats what is there"):
        open_source(tmp_path / "a.pt")
    torch.save({"w": torch.ones(1).expand(1000)}, tmp_path / "b.pt")
    with open_source(tmp_path / "b.pt") as source:
        assert source.parameters["w"]["param"].load().sum() == 1000
    torch.save({"w": torch.ones(3, device="meta")}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError):
        open_source(tmp_path / "c.pt")
