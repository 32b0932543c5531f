"""`Manifest` alone: as text and back, what of it is derived, and what of a text is refused. No file is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lightning_ssd.checkpoint.manifest import (
    BUFFERS,
    EXTRA_TENSORS,
    STATE,
    VERSION,
    FileRecord,
    Manifest,
    OptimizerRecord,
    SmallFile,
    version_for,
)
from lightning_ssd.checkpoint.manifest_json import decode_manifest, encode_manifest, seal
from lightning_ssd.errors import CheckpointError
from lightning_ssd.store.safetensors_header import TensorEntry

ENTRIES = (TensorEntry("é", "F32", (2, 3), 0, 24, (1, 2)), TensorEntry("b", "F32", (), 24, 28))
MANIFEST = Manifest(
    step=7,
    created_at="2026-01-01T00:00:00+00:00",
    versions={"torch": "2"},
    codec="float32",
    world_size=1,
    files=(
        FileRecord("units/00000-a.master.safetensors", 4124, "a", "master", 4096, ENTRIES, (0xFFFFFFFF,), {"b": "old"}),
        FileRecord("units/00001-a.exp_avg.safetensors", 4124, "a", "exp_avg", 4096, ENTRIES, None),
    ),
    dtypes={"b": "BF16"},
    aliases={"head": "b"},
    optimizers=(OptimizerRecord("C", [{"params": ["é"], "lr": 0.1}], {"é": {"step": 1}}, ["exp_avg"]),),
    small_files={STATE: SmallFile(3, 1), BUFFERS: SmallFile(4, 2)},
    names=("é", "b", "head"),
)


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The text with a change, and the checksum that fits."""
    content = json.loads(encode_manifest(MANIFEST)) | {"crc32c": "00000000"}
    change(content)
    return seal(json.dumps(content, separators=(",", ":")).encode())


def test_text_and_back() -> None:
    text = encode_manifest(MANIFEST)
    assert decode_manifest(text, "m") == MANIFEST
    without = replace(MANIFEST, names=None)
    assert decode_manifest(encode_manifest(without), "m") == without


def test_readers_of_version_2_are_kept_from_strides() -> None:
    assert version_for(MANIFEST.files) == 3
    assert version_for([replace(file, entries=ENTRIES[1:]) for file in MANIFEST.files]) == 2


def test_what_is_derived() -> None:
    assert MANIFEST.nbytes == 2 * 4124 + 3 + 4
    assert {name: list(kinds) for name, kinds in MANIFEST.parameters.items()} == {
        "é": ["master", "exp_avg"],
        "b": ["master", "exp_avg"],
    }
    assert MANIFEST.parameters["b"]["exp_avg"] == (MANIFEST.files[1], ENTRIES[1])
    assert MANIFEST.files[0].parameters == "'é', 'b'"


def test_names_of_files_in_each_version() -> None:
    assert [MANIFEST.file_name(name) for name in (STATE, BUFFERS, EXTRA_TENSORS)] == [STATE, BUFFERS, EXTRA_TENSORS]
    old = replace(MANIFEST, version=1, small_files={STATE: SmallFile(3, 1), "rest.safetensors": SmallFile(4, 2)})
    assert [old.file_name(name) for name in (BUFFERS, EXTRA_TENSORS)] == ["rest.safetensors", "odd.pt"]
    assert decode_manifest(encode_manifest(old), "m") == old
    with pytest.raises(CheckpointError, match=r"small_files must be state\.pt, rest\.safetensors and perhaps odd\.pt"):
        decode_manifest(encode_manifest(replace(MANIFEST, version=1)), "m")


@pytest.mark.parametrize("version", [0, VERSION + 1, "2", True, 1.0, None])
def test_other_versions_are_refused(version: object) -> None:
    with pytest.raises(CheckpointError, match=f"version '{version}' of the format.*reads versions 1 to {VERSION}"):
        decode_manifest(changed(lambda content: content.update(version=version)), "m")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format="zip"), "not a checkpoint"),
        (lambda c: c.update(step=-1), "step=-1 is not a count"),
        (lambda c: c["aliases"].update(top="head"), "leads to an alias"),
        (lambda c: c["dtypes"].update(b="F31"), "F31"),
        (lambda c: c["files"][0].update(path="../x"), "plain relative path"),
        (lambda c: c["files"][1].update(path=c["files"][0]["path"]), "listed twice"),
        (lambda c: c["files"][1].update(path="odd.pt"), "listed twice"),
        (lambda c: c["files"][1].update(kind="master"), "master of parameter 'é' is in two files"),
        (lambda c: c["files"][0].update(nbytes=4125), "do not make 4125 bytes"),
        (lambda c: c["files"][0].update(crc32c_per_mib=""), "0 checksums for 1 pieces"),
        (lambda c: c["state_dict"].append("b"), "a name twice"),
        (lambda c: c["files"][0]["parameters"]["é"].update(stride=[1, 3]), "cannot have the strides"),
        (lambda c: c["files"][0]["parameters"]["é"].update(stride=[1, -2]), "strides must be counts"),
    ],
)
def test_what_contradicts_itself_is_refused(change: Callable[[dict[str, Any]], object], says: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: .*{says}"):
        decode_manifest(changed(change), "m")


def test_a_flipped_bit_is_found() -> None:
    text = encode_manifest(MANIFEST).replace(b'"lr":0.1', b'"lr":0.2')
    with pytest.raises(CheckpointError, match="changed or damaged"):
        decode_manifest(text, "m")


def test_a_form_of_state_that_is_not_known_is_refused_by_name() -> None:
    text = encode_manifest(replace(MANIFEST, codec="int8-blocks"))
    with pytest.raises(
        CheckpointError, match=r"the state is in the form 'int8-blocks', .* reads 'float32', 'encoded': update"
    ):
        decode_manifest(text, "here")


def test_an_id_is_optional_and_checked() -> None:
    marked = replace(MANIFEST, id="0123456789abcdef" * 2)
    assert decode_manifest(encode_manifest(marked), "here").id == marked.id
    assert decode_manifest(encode_manifest(MANIFEST), "here").id == ""
    with pytest.raises(CheckpointError, match="id 'zz' is not 32 hexadecimal digits"):
        decode_manifest(encode_manifest(replace(MANIFEST, id="zz")), "here")
