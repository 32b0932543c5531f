from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_ssd.convert.importing import open_source
from lightning_ssd.convert.match import match
from lightning_ssd.errors import CheckpointError

WEIGHTS = {
    "layers.0.weight": torch.randn(30, 5),
    "layers.1.weight": torch.randn(7).bfloat16(),
    "head.bias": torch.ones(3),
}


def write_source(kind: str, folder: Path) -> Path:
    """The same weights in each form that can be read."""
    if kind == "folder":
        save_file(WEIGHTS, folder / "model.safetensors", {"format": "pt"})
        return folder
    if kind == "shards":
        names = list(WEIGHTS)
        shards = {"model-1.safetensors": names[:1], "model-2.safetensors": names[1:]}
        for shard, held in shards.items():
            save_file({name: WEIGHTS[name] for name in held}, folder / shard)
        index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder
    if kind == "safetensors":
        save_file(WEIGHTS, folder / "any.safetensors")
        return folder / "any.safetensors"
    torch.save(WEIGHTS if kind == "bin" else {"state_dict": WEIGHTS, "epoch": 1}, folder / f"w.{kind}")
    return folder / f"w.{kind}"


@pytest.mark.parametrize("kind", ["folder", "shards", "safetensors", "ckpt", "bin", "unknown"])
def test_every_form_gives_the_same_weights(kind: str, tmp_path: Path) -> None:
    with open_source(write_source(kind, tmp_path)) as source:
        assert source.shapes == {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
        for name, expected in WEIGHTS.items():
            held = source.value(name)
            tensor = held.load()
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)
            held.drop()


def test_an_index_cannot_lead_outside_or_lie(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(WEIGHTS, tmp_path / "outside.safetensors")
    save_file(WEIGHTS, folder / "inside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    for shard, name, says in (
        ("../outside.safetensors", "head.bias", "plain relative path"),
        ("link.safetensors", "head.bias", "symlink"),
        ("none.safetensors", "head.bias", "No such file"),
        ("inside.safetensors", "tail.bias", "does not hold it"),
        (7, "head.bias", "not a file name"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: shard}}))
        with pytest.raises(CheckpointError, match=says):
            open_source(folder)


def test_the_cache_of_hugging_face_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "rev"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(WEIGHTS, blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    with open_source(snapshot) as source:
        assert set(source.shapes) == set(WEIGHTS)


def test_pickles_are_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": nn.Linear(2, 2)}}, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match=r"Linear.*weights_only=False"):
        open_source(tmp_path / "m.ckpt")
    (tmp_path / "junk.pt").write_bytes(os.urandom(64))
    with pytest.raises(CheckpointError, match=r"junk\.pt"):
        open_source(tmp_path / "junk.pt")
    with pytest.raises(CheckpointError, match="no file"):
        open_source(tmp_path / "nothing")


BASE = {"embed.weight": (9, 4), "layers.0.w": (4, 4), "layers.1.w": (4, 4), "norm.w": (4,)}


def with_front(front: str) -> dict[str, tuple[int, ...]]:
    return {front + name: shape for name, shape in BASE.items()}


@pytest.mark.parametrize("here", ["", "model.", "net.model."])
@pytest.mark.parametrize("there", ["", "model.", "transformer."])
def test_fronts_are_found(here: str, there: str) -> None:
    wanted = with_front(here) | {"loss.scale": ()}
    found = with_front(there) | {"lm_head.w": (9, 4)}
    matched = match(wanted, found)
    assert matched.sources == {here + name: there + name for name in BASE}
    assert matched.missing == ("loss.scale",)
    assert matched.unexpected == ("lm_head.w",)


def test_whole_names_are_compared_where_a_map_renames() -> None:
    assert match(with_front("m."), BASE, by_prefix=False).sources == {}
    assert set(match(BASE, BASE, by_prefix=False).sources) == set(BASE)


def test_shapes_that_disagree_are_reported() -> None:
    matched = match(BASE, BASE | {"embed.weight": (8, 4)})
    assert matched.mismatched == {"embed.weight": ((9, 4), (8, 4))}


@pytest.mark.parametrize("stored", ["embed.weight", "head.weight", "tail.weight"])
def test_one_name_of_tied_tensors_serves_all(stored: str) -> None:
    wanted = {"model." + name: shape for name, shape in {**BASE, "head.weight": (9, 4), "tail.weight": (9, 4)}.items()}
    found = {name: shape for name, shape in BASE.items() if name != "embed.weight"} | {stored: (9, 4)}
    tied = {"model.head.weight": "model.embed.weight", "model.tail.weight": "model.embed.weight"}
    matched = match(wanted, found, tied=tied)
    assert {matched.sources[name] for name in (*tied, "model.embed.weight")} == {stored}
    assert (matched.missing, matched.unexpected) == ((), ())
