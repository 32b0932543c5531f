"""Checkpoints that were damaged or made to do harm."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_ssd.checkpoint.checksum import checksum
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.manifest_json import seal
from lightning_ssd.errors import CheckpointError, CorruptionError
from tests.checkpoint.hostile import read_all
from tests.checkpoint.mutations import places
from tests.checkpoint.support import Training

SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture
def checkpoint(training: Training, tmp_store: Path) -> Path:
    training.shapes = {"a": {"a.weight": (50, 7)}, "b": {"b.scale": (), "b.bias": (5,)}}
    training.advance()
    training.save(tmp_store / "c")
    shutil.copyfile(training.files[0].source, tmp_store / "secret.safetensors")
    return tmp_store / "c"


@contextmanager
def only_inside(path: Path) -> Iterator[None]:
    """Fail if a file outside ``path`` is opened."""
    real = os.open
    root = os.path.realpath(path)

    def watched(*args: Any, **kwargs: Any) -> int:
        fd = real(*args, **kwargs)
        opened = os.readlink(f"/proc/self/fd/{fd}")
        assert opened == root or opened.startswith(root + "/"), f"opened {opened}"
        return fd

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", watched)
        yield


def rewrite(checkpoint: Path, content: Any) -> None:
    """Put a changed manifest in place, with a right checksum, so that the checks behind it are reached."""
    if isinstance(content, dict):
        content["crc32c"] = "00000000"
    text = json.dumps(content, separators=(",", ":")).encode()
    with suppress(ValueError):
        text = seal(text)
    (checkpoint / "manifest.json").write_bytes(text)


def change(content: Any, **values: Any) -> Any:
    """A copy of the manifest with values of its first file changed."""
    copy = json.loads(json.dumps(content))
    copy["files"][0].update(values)
    return copy


@pytest.mark.parametrize(
    "path", ["../secret.safetensors", "/etc/passwd", "units/../../secret.safetensors", "", "units//x", "units/\0", "."]
)
def test_paths_stay_inside(checkpoint: Path, path: str) -> None:
    original = (checkpoint / "manifest.json").read_bytes()
    rewrite(checkpoint, change(json.loads(original), path=path))
    with only_inside(checkpoint), pytest.raises(CheckpointError, match="plain relative path"):
        CheckpointReader(checkpoint)


@pytest.mark.parametrize("what", ["file", "units", "manifest.json", "buffers.safetensors", "state.pt"])
def test_symlinks_and_fifos_inside_are_not_followed(checkpoint: Path, tmp_store: Path, what: str) -> None:
    inside = checkpoint / ("units/00000-a.master.safetensors" if what == "file" else what)
    outside = tmp_store / "outside"
    os.rename(inside, outside)
    inside.symlink_to(outside)
    with only_inside(checkpoint), pytest.raises(CheckpointError, match="symlink"):
        CheckpointReader(checkpoint)
    if what != "units":
        inside.unlink()
        os.mkfifo(inside)
        with pytest.raises(CheckpointError, match="not a regular file"):
            CheckpointReader(checkpoint)


def test_missing_truncated_and_flipped_files_are_named(checkpoint: Path) -> None:
    victim = checkpoint / "units" / "00001-a.exp_avg.safetensors"
    whole = victim.read_bytes()
    victim.unlink()
    with pytest.raises(CheckpointError, match=r"exp_avg of 'a\.weight'.*00001-a\.exp_avg"):
        CheckpointReader(checkpoint)
    victim.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"exp_avg of 'a\.weight'.*{len(whole) - 1} bytes, not {len(whole)}"):
        CheckpointReader(checkpoint)
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with (
        CheckpointReader(checkpoint) as reader,
        pytest.raises(CorruptionError, match=r"00001-a.*exp_avg of 'a\.weight'"),
    ):
        reader.verify()
    renamed = whole.replace(b'"a.weight"', b'"b.weight"')
    victim.write_bytes(renamed)
    with CheckpointReader(checkpoint) as reader, pytest.raises(CheckpointError, match=r"'a\.weight'"):
        reader.tensor("a.weight", "exp_avg")


@pytest.mark.parametrize("name", ["buffers.safetensors", "state.pt"])
def test_damaged_small_files_are_not_used(checkpoint: Path, name: str) -> None:
    data = bytearray((checkpoint / name).read_bytes())
    data[-1] ^= 0x80
    (checkpoint / name).write_bytes(data)
    with CheckpointReader(checkpoint) as reader:
        with pytest.raises(CorruptionError, match=name):
            reader.buffers() if name.startswith("buffers") else reader.state()
        with pytest.raises(CorruptionError, match=name):
            reader.verify()


@pytest.mark.parametrize("content", [{}, {"state": [], "hyper": 0}, {"state": None}, [1], {"hyper": {}}])
def test_a_state_of_another_form_is_refused(checkpoint: Path, content: Any) -> None:
    torch.save(content, checkpoint / "state.pt")
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    data = (checkpoint / "state.pt").read_bytes()
    manifest["small_files"]["state.pt"] = {"nbytes": len(data), "crc32c": f"{checksum(data):08x}"}
    manifest["optimizers"][0]["param_groups"][0]["lr"] = {"pickled": "x"}
    rewrite(checkpoint, manifest)
    with CheckpointReader(checkpoint) as reader:
        with pytest.raises(CheckpointError, match=r"state\.pt"):
            reader.state()
        with pytest.raises(CheckpointError, match=r"state\.pt|unknown form"):
            reader.optimizers()


def test_a_damaged_manifest_is_refused(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_bytes()
    (checkpoint / "manifest.json").write_bytes(text.replace(b'"lr":0.0005', b'"lr":0.0015'))
    with pytest.raises(CheckpointError, match="changed or damaged"):
        CheckpointReader(checkpoint)
    rewrite(checkpoint, json.loads(text) | {"version": 4})
    with pytest.raises(CheckpointError, match=r"version '4'.*reads versions 1 to 3; update it"):
        CheckpointReader(checkpoint)


def test_one_tensor_in_two_files_is_refused(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_bytes()
    content = json.loads(text)
    rewrite(checkpoint, content | {"files": content["files"] + [change(content, path="units/x")["files"][0]]})
    with pytest.raises(CheckpointError, match=r"master of parameter 'a\.weight' is in two files"):
        CheckpointReader(checkpoint)
    rewrite(checkpoint, content | {"files": content["files"] + [content["files"][0]]})
    with pytest.raises(CheckpointError, match="listed twice"):
        CheckpointReader(checkpoint)


HOSTILE = st.one_of(
    st.sampled_from(
        ["../secret.safetensors", "units/link.safetensors", "F64", "a.weight", "0" * 8, "", "\0", "\ud800", "x" * 5000]
    ),
    st.sampled_from([-1, 0, 1, 2**31, 2**40, 2**63, 2**64, 10**30, 1.5, True, None]),
    st.sampled_from([[], {}, [[]] * 3, {"a": {}}, {"tensor": ["U8", 999]}, {"pickled": "x"}, {"tuple": {}}]),
    st.just(json.loads("[" * 200 + "]" * 200)),
)


@settings(max_examples=700, **SETTINGS)
@given(data=st.data())
def test_no_manifest_does_harm(checkpoint: Path, data: st.DataObject) -> None:
    manifest = checkpoint / "manifest.json"
    original = manifest.with_suffix(".kept")
    if not original.exists():
        shutil.copyfile(manifest, original)
        (checkpoint / "units" / "link.safetensors").symlink_to(checkpoint.parent / "secret.safetensors")
    content = json.loads(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        *front, last = data.draw(st.sampled_from([p for p in places(content) if p]))
        holder = content
        for key in front:
            holder = holder[key]
        if data.draw(st.integers(0, 4)) == 0:
            del holder[last]
        else:
            holder[last] = json.loads(json.dumps(data.draw(HOSTILE)))
    rewrite(checkpoint, content)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with only_inside(checkpoint), suppress(CheckpointError, CorruptionError):
        read_all(checkpoint)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024  # KiB; the files have 30


@settings(max_examples=500, **SETTINGS)
@given(
    name=st.sampled_from(["manifest.json", "units/00000-a.master.safetensors", "buffers.safetensors", "state.pt"]),
    edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=3),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_no_damaged_file_does_harm(checkpoint: Path, name: str, edits: list[tuple[float, int]], keep: float) -> None:
    whole = (checkpoint / name).read_bytes()
    damaged = bytearray(whole)
    for position, value in edits:
        damaged[int(position * len(whole))] = value
    damaged = damaged[: int(keep * len(whole))]
    os.unlink(checkpoint / name)  # not written in place: the live generation shares the inode
    (checkpoint / name).write_bytes(damaged)
    try:
        with only_inside(checkpoint):
            read_all(checkpoint)
        accepted = True
    except (CheckpointError, CorruptionError):
        accepted = False
    finally:
        (checkpoint / name).write_bytes(whole)
    # Only spaces that pad a header may change unnoticed, into other white space that JSON allows.
    assert not accepted or damaged.split() == whole.split()
