"""Checkpoints that are damaged, foreign, or do not fit: refused before anything is trained on, with names."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ssd.checkpoint.manifest_json import seal
from lightning_ssd.errors import CheckpointError, CorruptionError
from tests.faults.support import small_gpt, streamed
from tests.helpers.models import GPT
from tests.helpers.training import train


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two steps; copied, never changed."""
    root = tmp_path_factory.mktemp("saved")
    result = train(root, small_gpt, streamed(checkpoint="links"), max_steps=2)
    result.trainer.save_checkpoint(root / "checkpoint")
    result.trainer.strategy.session.close()  # type: ignore[attr-defined]
    return root / "checkpoint.links"


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def unit_file(checkpoint: Path, part: str) -> Path:
    (found,) = [path for path in checkpoint.rglob("*.safetensors") if part in path.name]
    return found


def flip(checkpoint: Path) -> None:
    path = unit_file(checkpoint, "blocks.1.param")
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def flip_state(checkpoint: Path) -> None:
    path = unit_file(checkpoint, "blocks.0.exp_avg_sq")
    content = bytearray(path.read_bytes())
    content[4096 + 5] ^= 1
    path.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    path = unit_file(checkpoint, "tok.param")
    os.truncate(path, path.stat().st_size - 1)


def delete(checkpoint: Path) -> None:
    unit_file(checkpoint, "head.exp_avg.").unlink()


def rewrite_manifest(checkpoint: Path, old: str, new: str) -> None:
    """Change the manifest and put in the right checksum, as somebody who wants to do harm would."""
    manifest = checkpoint / "manifest.json"
    text = manifest.read_text()
    assert old in text
    content = json.loads(text.replace(old, new))
    text = json.dumps(content | {"crc32c": "00000000"}, separators=(",", ":"))
    manifest.write_bytes(seal(text.encode()))


def point_outside(checkpoint: Path) -> None:
    name = unit_file(checkpoint, "tok.param").name
    rewrite_manifest(checkpoint, f"units/{name}", f"../{name}")


def truncate_manifest(checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text()[:-9])


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def rename_a_parameter(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, "net.tok.weight", "net.tak.weight")


@pytest.mark.parametrize(
    ("damage", "error", "parts"),
    [
        (flip, CorruptionError, ("blocks.1.param", "net.blocks.1.")),
        (flip_state, CorruptionError, ("blocks.0.exp_avg_sq", "net.blocks.0.")),
        (truncate, CheckpointError, ("tok.param", "net.tok.weight")),
        (delete, CheckpointError, ("head.exp_avg",)),
        (point_outside, CheckpointError, ("../", "plain relative path")),
        (truncate_manifest, CheckpointError, ("manifest.json", "JSON")),
        (remove_manifest, CheckpointError, ("without a manifest", "interrupted")),
        (rename_a_parameter, (CheckpointError, CorruptionError), ("net.t",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_checkpoint_is_named_with_file_and_parameter(
    tmp_path: Path, checkpoint: Path, damage: Callable[[Path], None], error: type[Exception], parts: tuple[str, ...]
) -> None:
    damage(checkpoint)
    with pytest.raises(error) as raised:
        train(tmp_path, small_gpt, streamed(), max_steps=4, ckpt_path=str(checkpoint))
    missing = [part for part in parts if part not in str(raised.value)]
    assert not missing, str(raised.value)


def test_a_checkpoint_of_another_model_names_what_does_not_fit(tmp_path: Path, checkpoint: Path) -> None:
    for make_net, names in (
        (functools.partial(GPT, width=16, layers=3), ("Missing", "net.blocks.2.")),
        (functools.partial(GPT, width=16, layers=1), ("Unexpected", "net.blocks.1.")),
        (functools.partial(GPT, width=32, layers=2), ("size mismatch", "net.tok.weight")),
    ):
        with pytest.raises(Exception, match="net") as raised:
            train(tmp_path, make_net, streamed(), max_steps=4, ckpt_path=str(checkpoint))
        missing = [name for name in names if name not in str(raised.value)]
        assert not missing, str(raised.value)


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "noise").write_bytes(b"\x80\x02noise")
    for name, error in (("folder", "without a manifest"), ("noise", "noise"), ("absent", "absent")):
        with pytest.raises(Exception, match=error):
            train(tmp_path, small_gpt, streamed(), max_steps=1, ckpt_path=str(tmp_path / name))


def test_the_undamaged_one_still_resumes(tmp_path: Path, checkpoint: Path) -> None:
    whole = train(tmp_path, small_gpt, streamed(), max_steps=4)
    rest = train(tmp_path, small_gpt, streamed(), max_steps=4, ckpt_path=str(checkpoint))
    assert rest.losses == whole.losses[2:]
