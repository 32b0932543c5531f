"""What a small file of links, or its folder, may hold that means harm or is damaged: refused by name."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ssd.checkpoint.link_file import folder_id, mark_of
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.folder import Folder
from tests.checkpoint.support import links


class _Calls:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        from lightning_ssd.links import linked

        return linked, self.arguments


def _hostile(path: Path, *place: Any, text: str | None = None) -> None:
    mark = mark_of(str(path)) if text is None else text
    folder = _Calls(str(mark))
    torch.save({"state_dict": {"x": _Calls(folder, *place)}}, path)


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "/etc/passwd",
        "units/../../secret",
        "units//x",
        ".",
        "",
        "units",
        "link",
        "folder/secret",
        "fifo",
        "a\0b",
    ],
)
def test_no_path_leads_out(saved: Path, tmp_store: Path, path: str) -> None:
    (saved.parent / "secret").write_bytes(b"secret")
    (links(saved) / "link").symlink_to(saved.parent / "secret")
    (links(saved) / "folder").symlink_to(saved.parent)
    os.mkfifo(links(saved) / "fifo")
    _hostile(saved, path, 6, "x")
    for options in ({"weights_only": True}, {"weights_only": False}):
        with pytest.raises(CheckpointError, match=r"plain relative path|symlink|not a regular file|cannot open"):
            torch.load(saved, **options)


@pytest.mark.parametrize("name", ["..", ".", "../c", "/tmp", "a/b", "%2e%2e", "%2Ftmp", "", "a%00b", "x y"])
def test_no_folder_is_elsewhere(saved: Path, name: str) -> None:
    _hostile(saved, text=f"lightning-ssd-links 1 {'0' * 32} {name}")
    with pytest.raises(CheckpointError, match="not the name of a folder of links beside"):
        torch.load(saved)


def test_a_folder_that_is_a_symlink_is_refused(saved: Path, tmp_store: Path) -> None:
    links(saved).rename(tmp_store / "elsewhere")
    links(saved).symlink_to(tmp_store / "elsewhere")
    with pytest.raises(CheckpointError, match="a symlink"):
        torch.load(saved)


@pytest.mark.parametrize(
    "place",
    [
        (1, 2, 3),
        ("units", "x", "y"),
        ("a",),
        ("a", 1, "b", 3),
        ("a", 1, "b", "F32", "more"),
        (b"a", 1, "b"),
        ([], {}, ()),
    ],
)
def test_places_of_other_types_are_refused(saved: Path, place: tuple[Any, ...]) -> None:
    _hostile(saved, *place)
    with pytest.raises(CheckpointError, match="is not the place of a tensor"):
        torch.load(saved)


@pytest.mark.parametrize("first", [3, None, [1], {"a": 1}])
def test_what_is_no_folder_is_refused(saved: Path, first: Any) -> None:
    torch.save({"x": _Calls(first, "units", 1, "x")}, saved)
    with pytest.raises(CheckpointError, match="not in a folder of links"):
        torch.load(saved)


def test_sizes_and_names_are_checked(saved: Path) -> None:
    unit = next((links(saved) / "units").iterdir())
    _hostile(saved, f"units/{unit.name}", unit.stat().st_size + 1, "a.weight")
    with pytest.raises(CheckpointError, match="bytes, not"):
        torch.load(saved)
    _hostile(saved, "manifest.json", (links(saved) / "manifest.json").stat().st_size, "x")
    with pytest.raises(CheckpointError):
        torch.load(saved)


def test_a_truncated_unit_file_is_named(saved: Path) -> None:
    unit = next(path for path in (links(saved) / "units").iterdir() if path.stat().st_size > 4096)
    os.truncate(unit, 1000)
    with pytest.raises(CheckpointError, match=rf"{unit.name} has 1000 bytes, not"):
        torch.load(saved)


def test_the_mark_is_where_it_is_looked_for(saved: Path) -> None:
    """If torch ever lays out its archive in another way, this tells."""
    with zipfile.ZipFile(saved) as archive:
        assert archive.infolist()[0].filename.endswith("/data.pkl")
        found = archive.read(archive.infolist()[0])
    assert found.index(b"lightning-ssd-links") < 200
    with Folder.open(str(links(saved))) as folder:
        mark = mark_of(str(saved))
        assert mark is not None
        assert (folder_id(folder), mark.folder) == (mark.id, "x.ckpt.links")
    assert pickle.PROTO == b"\x80"
