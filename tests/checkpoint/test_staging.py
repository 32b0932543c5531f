"""`directory.staging` and `UnitFile` alone: a directory that takes its name at the end, or leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lightning_ssd.checkpoint.checksum import PIECE_NBYTES, checksum
from lightning_ssd.checkpoint.directory import staging
from lightning_ssd.checkpoint.unit_file import ComposedFile
from lightning_ssd.checkpoint.writer import lay_out_tensors
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.folder import Folder
from tests.checkpoint.support import write_generation


def test_it_takes_its_name_on_leaving(tmp_path: Path) -> None:
    target = tmp_path / "new" / "c"
    with staging(str(target)) as staged:
        assert os.path.basename(staged.path).startswith(f".c.tmp-{os.getpid()}-")
        assert not target.exists()
        (Path(staged.path) / "file").write_text("x")
    assert os.listdir(target.parent) == ["c"]
    assert (target / "file").read_text() == "x"


def test_it_is_gone_after_an_error(tmp_path: Path) -> None:
    interrupted = pytest.raises(KeyboardInterrupt)
    with interrupted, staging(str(tmp_path / "c")) as staged:
        (Path(staged.path) / "state.pt").write_text("x")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_nothing_of_the_users_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes").write_text("x")
    with pytest.raises(CheckpointError, match=r"did not write \(it holds 'notes'\)"), staging(str(tmp_path / "c")):
        pass
    assert os.listdir(tmp_path) == ["c"]


def test_a_directory_that_was_taken_away_is_not_published(tmp_path: Path) -> None:
    told = pytest.raises(CheckpointError, match="removed or renamed by somebody else")
    with told, staging(str(tmp_path / "c")) as s:
        os.rename(s.path, tmp_path / "elsewhere")
        Path(s.path).mkdir()
    assert not (tmp_path / "c").exists()


def test_a_unit_file_links_what_it_names(tmp_path: Path) -> None:
    unit = write_generation(tmp_path / "live", {"w": torch.arange(3.0)}, unit="a", kind="param")
    assert unit.nbytes == os.path.getsize(unit.source)
    with Folder.open(str(tmp_path)) as folder:
        unit.link_source(folder, "linked")
        assert os.path.samefile(unit.source, tmp_path / "linked")
        os.close(unit.open_source())
        os.unlink(unit.source)
        (tmp_path / "live").symlink_to("linked")
        with pytest.raises(OSError, match="symbolic"):
            unit.open_source()


def test_a_composed_file_asks_for_one_tensor_at_a_time(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5, dtype=torch.int16), "a": torch.rand(PIECE_NBYTES // 4 + 3)}
    events: list[str] = []

    class Source:
        def tensor(self, name: str) -> torch.Tensor:
            events.append(name)
            return tensors[name]

        def drop(self, name: str) -> None:
            events.append(f"drop {name}")

    file = ComposedFile("u", "param", lay_out_tensors(tensors), Source())
    written: list[int] = []
    sums = file.write(str(tmp_path / "f"), written.append)
    assert events == ["a", "drop a", "b", "drop b"]
    assert sum(written) == file.nbytes == os.path.getsize(tmp_path / "f")
    data = (tmp_path / "f").read_bytes()[file.data_begin :]
    assert sums == (checksum(data[:PIECE_NBYTES]), checksum(data[PIECE_NBYTES:]))
