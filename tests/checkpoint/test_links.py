"""A checkpoint in the form ``links``: a small file that torch loads, and a folder beside it with the tensors' bytes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ssd.checkpoint.directory import is_checkpoint
from lightning_ssd.checkpoint.link_file import mark_of
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.cli.main import main
from lightning_ssd.cli.stale_files import find_stale, remove_stale
from lightning_ssd.errors import CheckpointError
from lightning_ssd.io.folder import Folder
from lightning_ssd.saving import link_staging
from lightning_ssd.saving.link_staging import remove_checkpoint
from tests.checkpoint.support import Training, assert_whole, links

FORMS: list[dict[str, Any]] = [
    {},
    {"weights_only": True},
    {"weights_only": False},
    {"mmap": True},
    {"weights_only": False, "mmap": True},
    {"map_location": "cpu"},
    {"map_location": torch.device("cpu")},
    {"map_location": lambda storage, location: storage},
    {"map_location": {"cpu": "cpu"}},
]


def assert_loads(path: Any, training: Training, step: int, **options: Any) -> None:
    """`torch.load` gives Lightning's dictionary of that step."""
    found = torch.load(path, **options)
    for unit in training.shapes:
        for name, expected in training.tensors(unit, "master", step).items():
            dtype = torch.bfloat16 if name == "b.bias" else expected.dtype
            assert found["state_dict"][name].dtype == dtype
            assert torch.equal(found["state_dict"][name], expected.to(dtype))
    assert torch.equal(found["state_dict"]["head.weight"], found["state_dict"]["a.weight"])
    assert torch.equal(found["state_dict"]["buffer"], torch.arange(4) + step)
    assert found["loops"] == {"epoch": step}
    (optimizer,) = found["optimizer_states"]
    names = [name for unit in training.shapes.values() for name in unit]
    for unit in training.shapes:
        for name, expected in training.tensors(unit, "exp_avg", step).items():
            assert torch.equal(optimizer["state"][names.index(name)]["exp_avg"], expected)
    assert torch.equal(optimizer["state"][0]["row"], torch.full((700,), float(step)))
    assert optimizer["param_groups"][0]["lr"] == 1e-3 / step


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("options", FORMS, ids=lambda options: "-".join(options) or "default")
def test_torch_loads_it(saved: Path, training: Training, options: dict[str, Any]) -> None:
    assert saved.is_file()
    assert saved.stat().st_size < 20_000
    for path in (str(saved), saved):
        assert_loads(path, training, 1, **options)
    if "mmap" not in options:
        with open(saved, "rb") as file:
            assert_loads(file, training, 1, **options)


def test_map_location_moves_tensors(saved: Path) -> None:
    found = torch.load(saved, map_location="meta")
    assert {tensor.device.type for tensor in found["state_dict"].values()} == {"meta"}
    assert found["state_dict"]["a.weight"].shape == (700, 601)


def test_a_process_that_knows_nothing_of_us_loads_it(saved: Path) -> None:
    code = (
        "import sys, torch; found = torch.load(sys.argv[1], weights_only=True); "
        "print(found['state_dict']['a.weight'].shape, found['loops'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "torch.Size([700, 601]) {'epoch': 1}", done.stderr


def test_tensors_are_mapped_and_copied_only_where_written(saved: Path) -> None:
    before = {path: path.read_bytes() for path in links(saved).rglob("*.safetensors")}
    found = torch.load(saved)
    tensor = found["state_dict"]["a.weight"]
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split("-", 1)[0] for line in maps if str(links(saved) / "units") in line]
    assert len(spans) >= 4
    inside = [line for line in maps if _holds(line, tensor.data_ptr())]
    assert str(links(saved) / "units") in inside[0]
    tensor += 1
    found["optimizer_states"][0]["state"][0]["exp_avg"].zero_()
    assert before == {path: path.read_bytes() for path in before}


def _holds(line: str, address: int) -> bool:
    begin, end = (int(part, 16) for part in line.split()[0].split("-"))
    return begin <= address < end


def test_what_was_loaded_and_saved_again_holds_its_tensors(saved: Path, training: Training, tmp_path: Path) -> None:
    found = torch.load(saved)
    found["state_dict"]["a.weight"] = torch.zeros(3)
    torch.save(found, saved)
    assert mark_of(str(saved)) is None
    with pytest.raises(CheckpointError, match="holds everything"):
        CheckpointReader(saved)
    shutil.rmtree(links(saved))
    assert torch.equal(torch.load(saved)["state_dict"]["a.weight"], torch.zeros(3))


@pytest.mark.parametrize("made", [io.BytesIO, memoryview], ids=["buffer", "no file"])
def test_a_buffer_is_refused_with_the_way_out(saved: Path, made: Callable[[bytes], Any]) -> None:
    with pytest.raises(Exception, match=r"call torch\.load with its path|seek|tell"):
        torch.load(made(saved.read_bytes()))


# ------------------------------------------------------------------------------------------------------------- moving


@pytest.mark.parametrize("how", ["moved", "renamed", "copied", "file renamed", "folder renamed", "symlink", "relative"])
def test_both_are_found_together(
    saved: Path, training: Training, tmp_store: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved
    if how in ("moved", "renamed", "copied"):
        path = tmp_store / "d" / "x.ckpt" if how == "moved" else tmp_store / "c" / "y.ckpt"
        path.parent.mkdir(exist_ok=True)
        if how == "copied":
            shutil.copytree(links(saved), links(path))
            shutil.copy(saved, path)
            remove_checkpoint(saved)
        else:
            os.rename(links(saved), links(path))
            os.rename(saved, path)
    elif how == "file renamed":
        path = saved.with_name("best.ckpt")
        saved.rename(path)
    elif how == "folder renamed":
        links(saved).rename(saved.with_name("old.links"))
    elif how == "symlink":
        path = tmp_store / "last.ckpt"
        path.symlink_to(saved)
    else:
        monkeypatch.chdir(saved.parent)
        path = Path("x.ckpt")
    assert_loads(path, training, 1)
    with open(path, "rb") as file:
        assert_loads(file, training, 1)
    assert_whole(path, training, 1)


def test_a_folder_that_was_left_behind_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "x.ckpt")
    for read in (torch.load, CheckpointReader):
        with pytest.raises(CheckpointError, match=r"'x\.ckpt\.links' beside it, which is missing; move or copy both"):
            read(tmp_path / "x.ckpt")


def test_the_folder_of_another_checkpoint_is_refused(saved: Path, training: Training, tmp_store: Path) -> None:
    training.advance()
    other = tmp_store / "other.ckpt"
    training.save(other, with_file=True)
    shutil.rmtree(links(saved))
    links(other).rename(links(saved))
    for read in (torch.load, CheckpointReader):
        with pytest.raises(CheckpointError, match=r"'x\.ckpt\.links' beside it is not that folder"):
            read(saved)


# ------------------------------------------------------------------------------------------------ replacing, removing


@pytest.mark.parametrize("there", ["links", "file", "directory", "symlink", "empty directory", "half a folder"])
def test_what_has_the_name_is_replaced(saved: Path, training: Training, there: str, tmp_path: Path) -> None:
    path = saved.with_name("y.ckpt")
    if there == "links":
        training.save(path, with_file=True)
    elif there == "file":
        path.write_bytes(b"of plain Lightning")
    elif there == "directory":
        training.save(path)
    elif there == "symlink":
        path.symlink_to(saved)
    elif there == "empty directory":
        path.mkdir()
    else:
        training.save(path, with_file=True)
        path.rename(links(path) / "link.ckpt")
    training.advance()
    if there == "directory":
        with pytest.warns(UserWarning, match=r"is now .*y\.ckpt\.replaced"):
            training.save(path, with_file=True)
        assert_whole(Path(f"{path}.replaced"), training, 1)
    else:
        training.save(path, with_file=True)
    assert_loads(path, training, 2)
    assert_loads(saved, training, 1)
    left = {p.name for p in saved.parent.iterdir()} - {"y.ckpt.replaced"}
    assert left == {"x.ckpt", "x.ckpt.links", "y.ckpt", "y.ckpt.links"}
    assert not path.is_symlink()


def test_links_that_a_moved_file_needs_are_kept(saved: Path, training: Training) -> None:
    best = saved.with_name("best.ckpt")
    saved.rename(best)
    training.advance()
    with pytest.warns(UserWarning, match=r"perhaps to one that was moved away, and is now .*x\.ckpt\.links\.kept"):
        training.save(saved, with_file=True)
    assert_loads(saved, training, 2)
    assert_loads(best, training, 1)
    assert remove_checkpoint(best)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["x.ckpt", "x.ckpt.links"]


@pytest.mark.parametrize("name", ["x.ckpt", "x.ckpt.links"])
def test_a_directory_of_the_user_is_not_replaced(tmp_store: Path, training: Training, name: str) -> None:
    (tmp_store / name).mkdir()
    (tmp_store / name / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="is not replaced"):
        training.save(tmp_store / "x.ckpt", with_file=True)
    assert sorted(p.name for p in tmp_store.iterdir() if p.name != "live") == [name]


def test_removing_removes_both(saved: Path, training: Training) -> None:
    (links(saved) / "notes").write_text("mine")
    last = saved.with_name("last.ckpt")
    last.symlink_to(saved)
    assert remove_checkpoint(last)
    assert_loads(saved, training, 1)
    assert remove_checkpoint(saved)
    assert [str(p.relative_to(saved.parent)) for p in sorted(saved.parent.rglob("*"))] == [
        "x.ckpt.links",
        "x.ckpt.links/notes",
    ]
    plain = saved.with_name("plain.ckpt")
    torch.save({}, plain)
    assert not remove_checkpoint(plain)
    assert plain.exists()


def test_a_file_whose_links_are_gone_is_removed(saved: Path) -> None:
    shutil.rmtree(links(saved))
    assert remove_checkpoint(saved)
    assert not list(saved.parent.iterdir())


def test_two_that_save_to_one_name_do_not_mix(saved: Path, training: Training) -> None:
    with Folder.open(str(links(saved))) as held:
        assert held.try_lock()
        with pytest.raises(CheckpointError, match="another process"):
            training.save(saved, with_file=True)
        with pytest.raises(CheckpointError, match="another process"):
            remove_checkpoint(saved)
    assert_loads(saved, training, 1)


def test_a_look_for_stale_files_does_not_hold_the_links_of_a_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, locked = Folder.try_lock, list[str]()

    def try_lock(self: Folder, *, shared: bool = False) -> bool | None:
        locked.append(self.path)
        return real(self, shared=shared)

    monkeypatch.setattr(Folder, "try_lock", try_lock)
    assert find_stale(str(links(saved))) is None
    assert not remove_stale(str(links(saved)))
    assert not locked
    saved.unlink()
    found = find_stale(str(links(saved)))
    assert found is not None
    assert "may need it" in found.kept_because
    assert locked


def test_a_save_that_fails_leaves_what_was_there(
    saved: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.advance()
    before = sorted(p.name for p in saved.parent.iterdir())
    for name in ("_publish", "_commit"):
        with monkeypatch.context() as patch:
            patch.setattr(link_staging, name, lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
            with pytest.raises(CheckpointError, match="broken"):
                training.save(saved, with_file=True)
        assert_loads(saved, training, 1)
        assert sorted(p.name for p in saved.parent.iterdir()) == before


def test_the_folder_is_a_checkpoint_by_itself(saved: Path, training: Training) -> None:
    assert is_checkpoint(links(saved))
    assert_whole(links(saved), training, 1)
    saved.unlink()
    assert_whole(links(saved), training, 1)


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_commands_take_the_file_or_its_folder(saved: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    for path in (saved, links(saved)):
        assert main([command, str(path)]) == 0
        assert "exp_avg" in capsys.readouterr().out or command == "verify"


def test_it_is_copied_with_its_links(saved: Path, training: Training, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "y.ckpt"
    assert main(["copy", str(saved), str(target)]) == 0
    remove_checkpoint(saved)
    assert_loads(target, training, 1)
    assert_whole(target, training, 1)
    assert sorted(p.name for p in target.parent.iterdir()) == ["y.ckpt", "y.ckpt.links"]
    assert main(["copy", str(target), str(target)]) == 1
    target.rename(tmp_path / "aside.ckpt")  # as if the copy had been killed before the file
    links(target).rename(tmp_path / "y.links")
    shutil.copytree(tmp_path / "y.links", links(target))
    assert main(["copy", str(tmp_path / "aside.ckpt"), str(target)]) == 0
    assert_loads(target, training, 1)


def test_it_is_exported_and_imported(saved: Path, training: Training, tmp_path: Path) -> None:
    assert main(["export", str(saved), str(tmp_path / "plain.ckpt")]) == 0
    shutil.rmtree(links(saved))
    assert_loads(tmp_path / "plain.ckpt", training, 1, mmap=True)
    plain = torch.load(tmp_path / "plain.ckpt")["state_dict"]
    torch.save(plain, tmp_path / "weights.pt")
    for source, target in (("weights.pt", "again.ckpt"), ("again.ckpt", "third.ckpt")):
        assert main(["import", str(tmp_path / source), str(tmp_path / target)]) == 0
        found = torch.load(tmp_path / target)["state_dict"]
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_clean_removes_what_no_file_needs(
    saved: Path, training: Training, tmp_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed, moved = saved.with_name("killed.ckpt"), saved.with_name("moved.ckpt")
    for path in (killed, moved):
        training.save(path, with_file=True)
    killed.rename(links(killed) / "link.ckpt")  # before the file took its name, or after its removal began
    moved.rename(tmp_store / "moved.ckpt")
    replaced = saved.with_name("replaced.ckpt")
    training.save(replaced, with_file=True)
    shutil.copytree(links(replaced), tmp_store / "old")
    training.advance()
    training.save(replaced, with_file=True)
    links(replaced).rename(saved.with_name("replaced.ckpt.links.new"))  # killed before the folder took its name
    (tmp_store / "old").rename(links(replaced))
    capsys.readouterr()
    assert main(["clean", str(tmp_store), "--yes", "--json"]) == 0
    found = {Path(each["path"]).name: each for each in json.loads(capsys.readouterr().out)}
    assert {name: each["removed"] for name, each in found.items()} == {
        "killed.ckpt.links": True,
        "moved.ckpt.links": False,
        "replaced.ckpt.links": True,
    }
    assert not links(killed).exists()
    assert "moved away may need it" in found["moved.ckpt.links"]["kept_because"]
    assert_loads(saved, training, 1)
    assert_loads(replaced, training, 2)
