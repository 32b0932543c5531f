"""Sources of an import, taken alone: what they refuse, what they run (nothing), how much memory they take."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.manifest_json import seal
from lightning_ssd.convert.dcp import open_dcp
from lightning_ssd.convert.export import consolidate, to_safetensors
from lightning_ssd.convert.export_dcp import to_dcp
from lightning_ssd.convert.importing import ImportOptions, import_checkpoint, open_source
from lightning_ssd.convert.param_names import in_order_of, optimizer_from_torch
from lightning_ssd.convert.rename import Renaming
from lightning_ssd.errors import CheckpointError, CorruptionError
from tests.checkpoint.support import Training
from tests.convert.test_export import AnonymousMemory

# ------------------------------------------------------------------------------------------------------------- names


def test_renaming() -> None:
    rules = {"a.b": "x", "a.*": "z.*", "a.c.*": "y.*", "old": None, "gone.*": None}
    names = ["a.b", "a.d", "a.c.d", "old", "gone.1", "same"]
    found = Renaming(rules).apply(names)
    assert found == {"a.b": "x", "a.d": "z.d", "a.c.d": "y.d", "old": None, "gone.1": None, "same": "same"}
    assert Renaming({"*": "m.*"}).apply(["a"]) == {"a": "m.a"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"a": 3}, "leads to '3'"),
        ({"a.*": "b"}, r"\* stands at the end"),
        ({"*.a": "*.b"}, r"\* stands at the end"),
        ({"b": "c"}, "no tensor is called 'b'"),
        ({"a": "c"}, "both 'a' and 'c' would be called 'c'"),
    ],
)
def test_renaming_refuses(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Renaming(rules).apply(["a", "c"])


def state_of(shape: tuple[int, ...]) -> dict[str, Any]:
    return {"step": torch.tensor(1.0), "exp_avg": torch.zeros(shape)}


def test_states_find_their_parameters() -> None:
    shapes = {"w1": (2, 3), "b1": (3,), "bn.running_mean": (3,), "w2": (3, 2), "b2": (3,)}

    def names(*groups: dict[str, Any], state: dict[int, Any]) -> list[list[str]]:
        found, states = optimizer_from_torch({"state": state, "param_groups": list(groups)}, shapes, "it")
        assert len(states) == len(state)
        return [group["params"] for group in found]

    full = {i: state_of(s) for i, s in enumerate([(2, 3), (3,), (3, 2), (3,)])}
    assert names({"params": [0, 1, 2, 3]}, state=full) == [["w1", "b1", "w2", "b2"]]
    assert names({"params": [0, 1, 2, 3]}, state={}) == [["w1", "b1", "w2", "b2"]]
    split = {i: state_of(s) for i, s in enumerate([(2, 3), (3, 2), (3,), (3,)])}
    assert names({"params": [0, 1]}, {"params": [2, 3]}, state=split) == [["w1", "w2"], ["b1", "b2"]]
    named = {"params": [0, 1], "param_names": ["b2", "w1"]}
    assert names(named, state={0: state_of((3,))}) == [["b2", "w1"]]
    assert names({"params": ["w1", "b2"]}, state={"w1": state_of((2, 3))}) == [["w1", "b2"]]  # type: ignore[dict-item]
    for groups, state in [
        ([{"params": [0, 1]}, {"params": [2, 3]}], {i: state_of((3,)) for i in range(4)}),
        ([{"params": [0]}], {0: state_of((3,))}),
        ([{"params": [0, 1, 2, 3]}], split),
    ]:
        if groups == [{"params": [0, 1, 2, 3]}]:
            assert names(*groups, state=state) == [["w1", "w2", "b1", "b2"]]  # by shape, whatever the order
            continue
        with pytest.raises(CheckpointError, match="--weights-only"):
            names(*groups, state=state)
    for bad in ({}, {"state": [], "param_groups": []}, {"state": {}, "param_groups": [{"lr": 1}]}):
        with pytest.raises(CheckpointError, match="not what torch"):
            optimizer_from_torch(bad, shapes, "it")


def test_states_saved_with_names_go_by_them() -> None:
    saved = [["w", "v"], ["b", "c"]]
    state = {0: state_of((2, 3)), 1: state_of((4, 2)), 2: state_of((3,)), 3: state_of((3,))}
    content = {"state": state, "param_groups": [{"lr": 1, "params": [0, 1]}, {"lr": 2, "params": [2, 3]}]}

    def numbers(*shapes: dict[str, tuple[int, ...]]) -> tuple[list[list[int]], list[str]]:
        arranged, notes = in_order_of(content, saved, shapes, "it")
        assert arranged["state"] is state
        assert [group["lr"] for group in arranged["param_groups"]] == [1, 2]
        return [group["params"] for group in arranged["param_groups"]], notes

    w, v, b, c = {"w": (2, 3)}, {"v": (4, 2)}, {"b": (3,)}, {"c": (3,)}
    assert numbers(w | v, b | c) == ([[0, 1], [2, 3]], [])
    assert numbers(v | w, c | b) == ([[1, 0], [3, 2]], [])
    found, (note,) = numbers(v | w | c, b)
    assert found == [[1, 0, 3], [2]]
    assert "'c' were in another group" in note
    found, (note,) = numbers({"V": (4, 2)} | w, b | c)
    assert found == [[1, 0], [2, 3]]
    assert "'V' took the state of 'v', by their place" in note
    for wrong in [(w, b | c), (w | v | {"x": (1,)}, b | c), (w | {"V": (2, 4)}, b | c)]:
        with pytest.raises(CheckpointError, match=r"it, group 0: .*(x|V|none).*import"):
            numbers(*wrong)
    with pytest.raises(CheckpointError, match=r"has 2 parameter group\(s\), configure_optimizers made 1"):
        numbers(w | v | b | c)


# ---------------------------------------------------------------------------------------- torch.distributed.checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save({"model": {"w": torch.arange(12.0).view(4, 3), "n": torch.tensor(3)}}, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("HARM",)


def test_metadata_runs_no_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    metadata.planner_data = Harmful()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names builtins\.print"):
        open_dcp(folder)
    (folder / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_dcp(folder)
    assert "HARM" not in capsys.readouterr().out


def test_values_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"model": {"w": torch.ones(3)}, "optimizer": {"state": {}, "param_groups": [{"lr": Harmful()}]}}
    dcp.save(content, checkpoint_id=tmp_path / "dcp")
    capsys.readouterr()
    with pytest.raises(CheckpointError, match=r"print.*not loaded"):
        open_dcp(tmp_path / "dcp")
    assert "HARM" not in capsys.readouterr().out


def test_places_stay_inside_and_are_checked(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 100_000)
    whole = (folder / ".metadata").read_bytes()

    def change(**values: Any) -> None:
        metadata = pickle.loads(whole)
        for index, info in metadata.storage_data.items():
            if index.fqn == "model.w":
                vars(info).update(values)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    for values, message in [
        ({"relative_path": "../secret"}, "plain relative path"),
        ({"relative_path": "/etc/passwd"}, "plain relative path"),
        ({"offset": 10**12}, "too short"),
        ({"offset": -1}, "place that is none"),
        ({"length": "many"}, "place that is none"),
        ({"transform_descriptors": ["zstd"]}, "through"),
        ({"offset": 7}, r"cannot be read|not loaded"),
    ]:
        change(**values)
        with pytest.raises(CheckpointError, match=message), open_dcp(folder) as source:
            source.value("w").load()


def test_pieces_are_put_together(tmp_path: Path) -> None:
    """As several processes write them: pieces of one tensor in several files."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    whole = torch.arange(12.0).view(4, 3)
    dcp.save({"model": {"w": whole[:3].clone(), "v": whole[3:].clone()}}, checkpoint_id=tmp_path / "dcp")
    metadata = dcp.FileSystemReader(tmp_path / "dcp").read_metadata()
    tensors, places = metadata.state_dict_metadata, metadata.storage_data
    pieces = [((0, 0), (3, 3)), ((3, 0), (1, 3))]
    tensors["model.w"].chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in pieces]
    tensors["model.w"].size = torch.Size((4, 3))
    del tensors["model.v"]
    last = next(info for index, info in places.items() if index.fqn == "model.v")
    places[MetadataIndex("model.w", torch.Size((3, 0)))] = last
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    with open_dcp(tmp_path / "dcp") as source:
        assert torch.equal(source.value("w").load(), whole)
    tensors["model.w"].chunks.pop()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"pieces of 'model\.w'"):
        open_dcp(tmp_path / "dcp")


# ------------------------------------------------------------------------------------------------------- torch files


@pytest.mark.parametrize("place", ["file", "universal"])
def test_torch_files_run_no_code(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.ckpt" if place == "file" else tmp_path / "u"
    if place == "universal":
        (path / "zero" / "w").mkdir(parents=True)
    torch.save(
        {"param": torch.ones(3), "state_dict": {}, "x": Harmful()}, path if place == "file" else path / "zero/w/fp32.pt"
    )
    with pytest.raises(CheckpointError, match=r"print.*not loaded"):
        open_source(path)
    assert "HARM" not in capsys.readouterr().out


def test_a_torch_file_of_any_other_form(tmp_path: Path) -> None:
    torch.save(
        {"w": torch.ones(3), "n": torch.tensor(1), "z": torch.ones(2, dtype=torch.complex128)}, tmp_path / "w.pt"
    )
    import_checkpoint(tmp_path / "w.pt", tmp_path / "c")
    with CheckpointReader(tmp_path / "c") as reader:
        assert reader.parameter_names == ("w",)
        assert set(reader.buffers()) == {"n", "z"}
        assert reader.state()["global_step"] == 0
    torch.save({"epoch": 3}, tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="no named tensors"):
        import_checkpoint(tmp_path / "none.ckpt", tmp_path / "d")


def test_odd_optimizer_state_comes_along(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    content = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "lr_schedulers": []}
    torch.save(content, tmp_path / "a.ckpt")
    import_checkpoint(tmp_path / "a.ckpt", tmp_path / "c")
    with CheckpointReader(tmp_path / "c") as reader:
        expected = optimizer.state[model.weight]["row_var"]
        assert torch.equal(reader.buffers()["optimizer.0.weight.row_var"], expected)
        assert reader.optimizers()[0].param_groups[0]["eps"] == optimizer.param_groups[0]["eps"]


# ------------------------------------------------------------------------------------------------- checkpoints of ours


def test_a_checkpoint_of_ours_under_other_names(training: Training, tmp_store: Path) -> None:
    training.save(tmp_store / "c")
    rules = {"a.weight": "x.weight", "head.weight": "y.weight", "b.bias": None}
    report = import_checkpoint(tmp_store / "c", tmp_store / "d", ImportOptions(renaming=Renaming(rules)))
    assert report.left_over == ["b.bias"]
    with CheckpointReader(tmp_store / "d") as reader:
        reader.verify()
        assert reader.manifest.aliases == {"y.weight": "x.weight"}
        assert set(reader.parameter_names) == {"x.weight", "a.none", "b.scale"}
        for kind in ("master", "exp_avg"):
            assert torch.equal(reader.tensor("x.weight", kind), training.tensors("a", kind, 1)["a.weight"])
            assert torch.equal(reader.tensor("b.scale", kind), training.tensors("b", kind, 1)["b.scale"])
        record = reader.optimizers()[0]
        assert [group["params"] for group in record.param_groups] == [["x.weight", "a.none"], ["b.scale"]]
        assert torch.equal(reader.buffers()["optimizer.0.x.weight.row"], torch.full((700,), 1.0))
        # The file of unit a is a link; that of b lost a tensor, so it is written anew.
        links = {file.name: file.stat().st_nlink for file in (tmp_store / "d.links" / "units").iterdir()}
        assert sorted(links.values()) == [1, 1, 3, 3]
        again = import_checkpoint(tmp_store / "d", tmp_store / "e", ImportOptions(renaming=Renaming({"x.*": "z.*"})))
    assert again.renamed == {"x.weight": "z.weight"}
    with CheckpointReader(tmp_store / "e") as reader:
        assert torch.equal(reader.tensor("z.weight", "master"), training.tensors("a", "master", 1)["a.weight"])


@pytest.mark.parametrize("kind", ["master", "exp_avg"])
def test_damage_is_found_before_its_bytes_get_other_checksums_or_none(
    training: Training, tmp_store: Path, kind: str
) -> None:
    training.save(tmp_store / "c")
    for file in (tmp_store / "c" / "units").glob(f"*b.{kind}*"):
        file.write_bytes(file.read_bytes()[:-4] + b"****")
    ways: list[Callable[[Path], object]] = [
        lambda to: import_checkpoint(tmp_store / "c", to, ImportOptions(renaming=Renaming({"b.bias": None}))),
        lambda to: consolidate(tmp_store / "c", to),
        lambda to: to_dcp(tmp_store / "c", to),
    ]
    if kind == "master":
        ways.append(lambda to: to_safetensors(tmp_store / "c", to))
    else:
        to_safetensors(tmp_store / "c", tmp_store / "weights are whole")
    for number, way in enumerate(ways):
        with pytest.raises(CorruptionError, match=f"it holds {kind} of 'b"):
            way(tmp_store / f"to-{number}")
        assert not (tmp_store / f"to-{number}").exists()


def test_no_memory_in_proportion_to_the_source(tmp_store: Path) -> None:
    nbytes = 192 << 20
    tensors = {f"w{i}": torch.full((nbytes // 32,), float(i)) for i in range(8)}
    (tmp_store / "hf").mkdir()
    save_file(tensors, tmp_store / "hf" / "model.safetensors")
    torch.save({"state_dict": tensors}, tmp_store / "w.ckpt")
    for name, tensor in tensors.items():
        (tmp_store / "u" / "zero" / name).mkdir(parents=True)
        torch.save({"param": tensor}, tmp_store / "u" / "zero" / name / "fp32.pt")
    dcp.save({"model": tensors}, checkpoint_id=tmp_store / "dcp")
    del tensors
    for source, slack in (
        ("hf", 16),
        ("w.ckpt", 16),
        ("u", 16),
        ("dcp", 16 + 2 * 24),
    ):  # MiB; dcp: a tensor, and as read
        with AnonymousMemory() as memory:
            import_checkpoint(tmp_store / source, tmp_store / f"{source}-c")
        assert memory.growth_nbytes < slack << 20, source
    assert threading.active_count() < 4


def test_a_manifest_that_lies_about_names_is_refused(training: Training, tmp_store: Path) -> None:
    training.save(tmp_store / "c")
    manifest = tmp_store / "c" / "manifest.json"
    content = json.loads(manifest.read_bytes())
    for renamed, message in [
        ({"nobody": "a.weight"}, "renamed"),
        ({"a.weight": "a.none"}, "two alike"),
        ({"a.weight": "other"}, "does not list"),
        ({"a.weight": 3}, "text"),
        ([], "renamed"),
    ]:
        content["files"][0]["renamed"] = renamed
        content["crc32c"] = "00000000"
        manifest.write_bytes(seal(json.dumps(content, separators=(",", ":")).encode()))
        with pytest.raises(CheckpointError, match=message), CheckpointReader(tmp_store / "c") as reader:
            reader.tensor("a.weight", "master")


def test_weights_alone_need_no_optimizer_that_makes_sense(tmp_path: Path) -> None:
    path, weights = tmp_path / "a.ckpt", {"w": torch.ones(3), "b": torch.zeros(3)}
    strange = {"state": {}, "param_groups": [{"params": [0, 1, 2]}]}
    for state in (strange, {"of": "another form"}):
        torch.save({"state_dict": weights, "optimizer_states": [state]}, path)
        with pytest.raises(CheckpointError, match=r"does not follow from order|is not what torch.optim saves"):
            import_checkpoint(path, tmp_path / "x")
        report = import_checkpoint(path, tmp_path / "x", ImportOptions(weights_only=True, dry_run=True))
        assert (report.matched, report.optimizers) == (2, "none")
