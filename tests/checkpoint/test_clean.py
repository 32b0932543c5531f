"""``lightning-ssd clean``: what the dead left goes, the living and what we did not make stay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_ssd.checkpoint import directory
from lightning_ssd.cli.main import main
from lightning_ssd.cli.stale_files import find_stale, remove_stale
from lightning_ssd.io.folder import Folder
from lightning_ssd.store.run_directory import RunDirectory, dead_runs, remove_dead_run
from tests.checkpoint.support import Training, assert_whole

HOLD = (
    "import sys; from lightning_ssd.store.run_directory import RunDirectory; "
    "run = RunDirectory(sys.argv[1]); print(run.path, flush=True); sys.stdin.read()"
)


def dead_run_in(root: Path) -> Path:
    """The directory of a run that was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        (path / "0.safetensors").write_bytes(b"x" * 90_000)
        (path / "inputs-0000.spill").write_bytes(b"x" * 10_000)
        process.send_signal(signal.SIGKILL)
    return path


def dead_save(training: Training, target: Path) -> Path:
    """What a save that was killed just before it published left behind."""
    child = os.fork()
    if child == 0:
        directory._publish = lambda *_: os._exit(0)  # type: ignore[assignment]
        training.save(target)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    (path,) = target.parent.glob(f".{target.name}.tmp-*")
    return path


def fill(staged: Folder, training: Training) -> None:
    """Put a whole checkpoint into a staging directory."""
    made = Path(staged.path).with_name("made")
    training.save(made)
    for each in made.iterdir():
        each.rename(Path(staged.path) / each.name)
    made.rmdir()


def clean(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    code = main(["clean", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_shows_first_and_removes_only_when_told(
    training: Training, tmp_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, alive = dead_run_in(tmp_store / "live"), RunDirectory(str(tmp_store / "live"))
    training.save(tmp_store / "kept.ckpt")
    save = dead_save(training, tmp_store / "sub" / "last.ckpt")
    everything = {str(run), str(save)}

    code, found = clean(tmp_store, capsys=capsys)
    assert code == 0
    assert {find["path"] for find in found} == everything
    assert {find["what"] for find in found} == {"dead run", "unfinished save"}
    assert not any(find["removed"] or find["kept_because"] for find in found)
    assert all(0 <= find["age_s"] < 600 for find in found)
    (run_find,) = (find for find in found if find["what"] == "dead run")
    assert 100_000 <= run_find["nbytes"] < 150_000
    assert main(["clean", str(tmp_store)]) == 0  # no terminal: nobody to ask
    assert "2 can go" in capsys.readouterr().out
    assert run.exists()
    assert save.exists()

    code, found = clean(tmp_store, "--yes", capsys=capsys)
    assert code == 0
    assert all(find["removed"] for find in found)
    assert not run.exists()
    assert not save.exists()
    assert os.path.isdir(alive.path)
    alive.close(remove=True)
    assert_whole(tmp_store / "kept.ckpt", training, 1)
    assert clean(tmp_store, capsys=capsys) == (0, [])


@pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("\n", False), ("", False)])
def test_asks_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, gone: bool) -> None:
    run = dead_run_in(tmp_path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdin, "readline", lambda: answer, raising=False)
    assert main(["clean", str(tmp_path)]) == 0
    assert run.exists() != gone


def test_the_default_place_is_that_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = dead_run_in(tmp_path / "disk")
    monkeypatch.setenv("LIGHTNING_SSD_PATH", str(tmp_path / "disk"))
    assert [find["path"] for find in clean(capsys=capsys)[1]] == [str(run)]
    monkeypatch.delenv("LIGHTNING_SSD_PATH")
    monkeypatch.chdir(tmp_path)
    assert [find["path"] for find in clean(capsys=capsys)[1]] == [str(run)]
    assert main(["clean", str(tmp_path / "nowhere")]) == 1


def test_what_we_did_not_make_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = dead_run_in(tmp_path)
    outside = tmp_path / "outside.safetensors"
    outside.write_text("mine")
    (run / "link.safetensors").symlink_to(outside)
    (run / "folder.safetensors").mkdir()
    (run / "notes.txt").touch()
    probe = run / ".direct-probe-a1_x"
    probe.mkdir()
    (probe / "probe").touch()
    code, found = clean(tmp_path, "--yes", capsys=capsys)
    assert code == 1
    assert "not removed" in found[0]["kept_because"]
    assert sorted(os.listdir(run)) == ["folder.safetensors", "link.safetensors", "notes.txt"]
    assert outside.read_text() == "mine"


def test_symlinks_and_impostors_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = dead_run_in(tmp_path / "elsewhere")
    root = tmp_path / "root"
    root.mkdir()
    (root / run.name).symlink_to(run)
    (root / "link").symlink_to(tmp_path / "elsewhere")
    for name, lock in (("ssd-run-mine", True), ("ssd-run-20260101-000000-1-000001", False)):
        (root / name).mkdir()
        (root / name / "0.safetensors").touch()
        if lock:
            (root / name / "lock").touch()
    odd = root / "ssd-run-20260101-000000-1-000002"
    odd.mkdir()
    (odd / "lock").symlink_to(run / "lock")
    before = sorted(root.rglob("*"))
    assert clean(root, "--yes", capsys=capsys) == (0, [])
    assert sorted(root.rglob("*")) == before
    assert not remove_dead_run(str(root / run.name))
    assert (run / "0.safetensors").exists()


def test_a_run_of_another_machine_or_user_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = dead_run_in(tmp_path)
    (run / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    code, found = clean(tmp_path, "--yes", capsys=capsys)
    assert (code, found[0]["removed"]) == (0, False)
    assert "elsewhere" in found[0]["kept_because"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert clean(tmp_path, "--yes", "--other-hosts", capsys=capsys) == (0, [])
    assert clean(tmp_path, "--yes", "--other-hosts", capsys=capsys)[1][0]["removed"]
    assert not run.exists()


def test_a_run_that_is_being_made_is_left_alone(tmp_path: Path) -> None:
    unborn = tmp_path / ".new-ssd-run-20260101-000000-1-000001"
    unborn.mkdir()
    (unborn / "lock").touch()
    assert dead_runs(str(tmp_path)) == []
    long_ago_s = time.time() - 7200
    for path in (unborn / "lock", unborn):
        os.utime(path, (long_ago_s, long_ago_s))
    assert [run.path for run in dead_runs(str(tmp_path))] == [str(unborn)]


EXPORTS = {
    "out.ckpt": ("lightning_ssd.convert.export", "consolidate", {}),
    "hf": ("lightning_ssd.convert.export", "to_safetensors", {"max_shard": "1MB"}),
    "dcp": ("lightning_ssd.convert.export_dcp", "to_dcp", {}),
}
EXPORT = """
import importlib, sys
checkpoint, target, module, name, options = sys.argv[1:]
module = importlib.import_module(module)
# What makes an export durable comes before it takes its name.
def halt(*arguments):
    print(flush=True)
    sys.stdin.read()
if name == "consolidate":
    importlib.import_module("lightning_ssd.checkpoint.writer").StreamWriter.finish = halt
else:
    module.publish = halt
getattr(module, name)(checkpoint, target, **eval(options))
"""


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_left_alone_until_it_is_dead(
    training: Training, tmp_store: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    training.save(tmp_store / "c")
    (tmp_store / "config").mkdir()
    (tmp_store / "config" / "tokenizer.of-any-name").write_text("{}")
    module, function, options = EXPORTS[name]
    if name == "hf":
        options = options | {"config_from": str(tmp_store / "config")}
    before = sorted(os.listdir(tmp_store))
    command = [sys.executable, "-c", EXPORT, str(tmp_store / "c"), str(tmp_store / name), module, function]
    with subprocess.Popen([*command, repr(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        assert clean(tmp_store, "--yes", capsys=capsys) == (0, [])
        assert len(os.listdir(tmp_store)) == len(before) + 1
        process.send_signal(signal.SIGKILL)
    code, found = clean(tmp_store, capsys=capsys)
    assert (code, [find["what"] for find in found]) == (0, ["unfinished export"])
    assert found[0]["nbytes"] > 0
    assert sorted(os.listdir(tmp_store)) != before
    assert clean(tmp_store, "--yes", capsys=capsys)[1][0]["removed"]
    assert sorted(os.listdir(tmp_store)) == before


def test_what_no_export_writes_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f".{name}.export-1-0123abcd" for name in ("text", "shared", "link", "mixed", "config", "nested")]
    text, shared, link, mixed, config, nested = (tmp_path / name for name in names)
    text.write_text("mine")
    shared.write_bytes(b"PK\x03\x04")
    os.chmod(text, 0o600)
    os.chmod(shared, 0o644)
    link.symlink_to(text)
    for folder, inside in ((mixed, ("model.safetensors", "notes.txt")), (config, ("config.json",)), (nested, ())):
        folder.mkdir(0o700)
        for name in inside:
            (folder / name).touch(0o644)
    os.chmod(config / "config.json", 0o600)  # private, but without weights
    (nested / "model.safetensors").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert clean(tmp_path, "--yes", capsys=capsys) == (0, [])
    assert sorted(tmp_path.rglob("*")) == before
    (mixed / "notes.txt").unlink()
    assert clean(tmp_path, "--yes", capsys=capsys)[1][0]["removed"]
    assert not mixed.exists()


def test_a_save_that_lives_is_left_alone(
    training: Training, tmp_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with directory.staging(str(tmp_store / "c")) as staged:
        assert clean(tmp_store, "--yes", capsys=capsys) == (0, [])
        assert os.path.isdir(staged.path)
        fill(staged, training)  # something to publish
    assert_whole(tmp_store / "c", training, 1)


def test_the_only_copy_of_a_checkpoint_stays(
    training: Training, tmp_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training.save(tmp_store / "c")
    aside = tmp_store / ".c.old-1-0123abcd"
    (tmp_store / "c").rename(aside)
    code, found = clean(tmp_store, "--yes", capsys=capsys)
    assert (code, found[0]["removed"]) == (0, False)
    assert "only copy" in found[0]["kept_because"]
    assert not remove_stale(str(aside))
    directory.recover(str(tmp_store / "c"))
    assert_whole(tmp_store / "c", training, 1)


def test_a_directory_with_something_else_in_it_is_no_leftover(training: Training, tmp_store: Path) -> None:
    path = dead_save(training, tmp_store / "c")
    assert find_stale(str(path)) is not None
    (path / "units" / "notes.txt").touch()
    assert find_stale(str(path)) is None
    (path / "units" / "notes.txt").unlink()
    (path / "buffers.safetensors").unlink()
    (path / "buffers.safetensors").symlink_to(tmp_store)
    assert find_stale(str(path)) is None


def test_a_save_leaves_alone_what_another_user_planted(
    training: Training, tmp_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory that many may write to, they could exchange what is inside it while we remove it."""
    planted = [tmp_store / name for name in (".c.tmp-1-0123abcd", ".c.old-1-0123abcd")]
    training.save(planted[0])
    training.save(planted[1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        directory.recover(str(tmp_store / "c"))
        assert not (tmp_store / "c").exists()
        training.save(tmp_store / "c")
    assert all((path / "manifest.json").exists() for path in planted)
    training.save(tmp_store / "c")
    assert not any(path.exists() for path in planted)


def test_a_store_that_was_kept_is_no_dead_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(str(tmp_path), keep=True)
    (Path(run.path) / "0.safetensors").write_bytes(b"x")
    run.close(remove=False)
    assert dead_runs(str(tmp_path)) == []
    code, found = clean(tmp_path, "--yes", capsys=capsys)
    assert (code, found[0]["what"], found[0]["removed"]) == (0, "kept store", False)
    assert "--kept" in found[0]["kept_because"]
    assert not remove_dead_run(run.path)
    assert sorted(os.listdir(run.path)) == ["0.safetensors", "lock"]
    assert clean(tmp_path, "--yes", "--kept", capsys=capsys)[1][0]["removed"]
    assert os.listdir(tmp_path) == []


def test_a_forked_child_that_ends_takes_nothing_along(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    child = os.fork()
    if child == 0:
        run.close(remove=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.listdir(run.path) == ["lock"]
    assert not remove_dead_run(run.path)  # and the lock is held as before
    run.close(remove=True)
    assert os.listdir(tmp_path) == []
