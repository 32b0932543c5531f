"""Forms of the state on disk: ``state="split"`` is ``state="fp32"`` to the bit, in runs, checkpoints and exports."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.codec.encodings import FIRST_BF16, LOW, NUDGED, TIE
from lightning_ssd.convert.export import consolidate
from lightning_ssd.convert.export_dcp import to_dcp
from lightning_ssd.convert.importing import import_checkpoint
from lightning_ssd.errors import CheckpointError, ConfigurationError
from lightning_ssd.session.handover import masters_of
from lightning_ssd.session.session import Session
from lightning_ssd.units.mapped import snapshot
from tests.helpers.docs import DOCS, code_blocks
from tests.helpers.models import GPT
from tests.helpers.training import Result, assert_equal, streamed, train

MODEL = functools.partial(GPT, tie=True)


def adamw(module: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    """Masters reach many ties: a learning rate that is a power of two, and no decay."""
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.95))


def fit(tmp_path: Path, state: str, make_net: Callable[[], nn.Module] = MODEL, **options: Any) -> Result:
    given = {"host_memory", "overlap", "checkpoint", "min_unit_numel", "update", "units"}
    settings = {key: options.pop(key) for key in given & options.keys()}
    strategy = streamed(**({"update": "auto", "state": state} | settings))
    options = {"precision": "bf16-true", "max_steps": 6, "optimizer": adamw} | options
    return train(tmp_path, make_net, strategy, **options)


def session_of(result: Result) -> Session:
    return result.trainer.strategy.session  # type: ignore[attr-defined, no-any-return]


def files_of(result: Result) -> set[str]:
    session = session_of(result)
    return {kind for unit in session.units for kind in session.store.kinds(unit.name)}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def all_state(result: Result) -> dict[str, Tensor]:
    """Masters and moments, by name."""
    masters = masters_of(session_of(result))
    found = {name: masters[param] for name, param in result.module.named_parameters() if param in masters}
    (optimizer,) = result.trainer.optimizers
    for number, state in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{key}": value for key, value in state.items()}
    return found


def assert_same(a: Result, b: Result) -> None:
    assert_equal(a, b)
    ours, theirs = all_state(a), all_state(b)
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in key for key in ours)
    different = [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(bits(ours[n]), bits(theirs[n]))]
    assert not different


class Frozen(GPT):
    """A unit with parameters that are not trained, and one whose parameter gets no gradient."""

    def __init__(self) -> None:
        super().__init__(tie=True)
        self.blocks[0].up.requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(7, 3))


class Writes(pl.Callback):
    """Writes to parameters outside of steps and inside, to some elements of each."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        with torch.no_grad():
            module.net.head.weight[::3].mul_(0.5)
            module.net.blocks[1].out.weight.data.clamp_(-0.05, 0.05)

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        with torch.no_grad():
            module.net.norm.weight[:5].add_(0.125)


RUNS: dict[str, dict[str, Any]] = {
    "in backward": {},
    "after backward": {"overlap": "off"},
    "clipped": {"gradient_clip_val": 0.5},
    "accumulated": {"accumulate_grad_batches": 2},
    "few large units": {"min_unit_numel": 1_000_000},
    "in memory": {"host_memory": "256MiB"},
    "frozen": {"make_net": Frozen},
    "written to": {},
    "written to in memory": {"host_memory": "256MiB"},
    "Adam with a penalty": {"optimizer": lambda m: torch.optim.Adam(m.parameters(), weight_decay=0.01, maximize=True)},
}


@pytest.mark.parametrize("name", RUNS)
def test_split_is_fp32_to_the_bit(tmp_path: Path, name: str) -> None:
    plain, split = (
        fit(tmp_path, state, callbacks=[Writes()] if "written" in name else [], **RUNS[name])
        for state in ("fp32", "auto")
    )
    assert files_of(plain).isdisjoint({LOW, TIE})
    assert files_of(split).isdisjoint({LOW, TIE}) == ("memory" in name)
    assert_same(plain, split)


def from_half(path: Path, save_as: str) -> str:
    """A float32 checkpoint whose weights were float16."""
    pl.seed_everything(3, verbose=False)
    net = GPT(tie=True).half().float()
    content = torch.load(path, weights_only=False)
    for name in content["state_dict"]:
        content["state_dict"][name] = net.state_dict()[name.removeprefix("net.")]
    content.pop("ssd_offload_masters", None)
    target = str(path.parent / save_as)
    torch.save(content, target)
    return target


@pytest.mark.parametrize("form", ["file", "links"])
def test_a_resume_goes_from_form_to_form(tmp_path: Path, form: str) -> None:
    """fp32, then split, then fp32: all that is equal to a run that never changed, with masters that are ties."""
    first = fit(tmp_path, "fp32", max_steps=2, checkpoint="file")
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    start = from_half(tmp_path / "first.ckpt", "half.ckpt")
    whole = fit(tmp_path, "fp32", max_steps=8, ckpt_path=start)
    path = start
    for number, state in enumerate(("split", "fp32", "split"), start=2):
        part = fit(tmp_path, state, max_steps=2 * number, ckpt_path=path, checkpoint=form)
        if number == 2:
            tied = [t for unit in session_of(part).units for t in tied_of(session_of(part), unit.name)]
            assert any(bool((tensor.view(torch.int32) < 0).any()) for tensor in tied)
        path = str(tmp_path / f"{number}.ckpt")
        part.trainer.save_checkpoint(path)
    assert part.losses == whole.losses[-2:]
    ours, theirs = all_state(part), all_state(whole)
    assert [name for name in theirs if not torch.equal(bits(ours[name]), bits(theirs[name]))] == []
    assert all(torch.equal(part.weights[name], whole.weights[name]) for name in whole.weights)


def tied_of(session: Session, unit: str) -> tuple[Tensor, ...]:
    generation = session.store.current(unit, TIE)
    return () if generation is None else snapshot(session.store, generation)


def values_in(content: dict[str, Any]) -> dict[str, Tensor]:
    found = {name: value for name, value in content["state_dict"].items()}
    for number, state in content["optimizer_states"][0]["state"].items():
        found |= {f"{number}.{key}": value for key, value in state.items()}
    return found


def assert_values(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def test_every_way_out_has_plain_values(tmp_path: Path) -> None:
    """What torch.load, exports and imports give of a checkpoint of encoded files is what they give of plain ones."""
    loaded: dict[str, dict[str, Tensor]] = {}
    for state in ("fp32", "split"):
        run = fit(tmp_path, state, checkpoint="links")
        path = tmp_path / f"{state}.ckpt"
        run.trainer.save_checkpoint(path)
        links = Path(f"{path}.links")
        consolidate(links, tmp_path / f"{state}.one.ckpt")
        import_checkpoint(path, tmp_path / f"{state}.imported.ckpt")
        to_dcp(links, tmp_path / f"{state}.dcp")
        import_checkpoint(tmp_path / f"{state}.dcp", tmp_path / f"{state}.from_dcp.ckpt")
        for suffix in ("", ".one", ".imported", ".from_dcp"):
            content = torch.load(tmp_path / f"{state}{suffix}.ckpt", weights_only=True)
            loaded[state + suffix] = values_in(content)
            masters = content.get("ssd_offload_masters", {})
            loaded[state + suffix] |= {f"master {name}": value for name, value in masters.items()}
    for suffix in ("", ".one", ".imported", ".from_dcp"):
        assert any("exp_avg_sq" in name for name in loaded["split" + suffix])
        assert_values(loaded["split" + suffix], loaded["fp32" + suffix])


def test_what_is_shown_can_be_written_to(tmp_path: Path) -> None:
    class Halve(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            (optimizer,) = trainer.optimizers
            for state in list(optimizer.state.values())[::2]:
                state["exp_avg_sq"].mul_(0.5)
                state["exp_avg"].data.mul_(0.5)

    assert_same(*(fit(tmp_path, state, callbacks=[Halve()]) for state in ("fp32", "split")))


def test_another_optimizer_takes_over_in_the_run(tmp_path: Path) -> None:
    """Masters outlive the second moments in whose signs a part of them is, and a form that the next class cannot."""

    class Swap(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, batch: Any, output: Any, index: int) -> None:
            make = {1: functools.partial(adamw, lr=2e-3), 3: lambda m: torch.optim.SGD(m.parameters(), lr=0.01)}
            if index in make:
                trainer.strategy.optimizers = [make[index](module)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, split = (fit(tmp_path, s, callbacks=[Swap()], schedule=False) for s in ("fp32", "split"))
    assert files_of(split).isdisjoint({LOW, TIE})
    assert_equal(plain, split)
    masters = [masters_of(session_of(result)) for result in (plain, split)]
    names = dict(plain.module.named_parameters())
    for name, param in split.module.named_parameters():
        assert torch.equal(bits(masters[1][param]), bits(masters[0][names[name]])), name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no master": ({"precision": "32-true"}, "bfloat16 parameters with a float32 master"),
    "float16": ({"precision": "16-true"}, "bfloat16 parameters with a float32 master"),
    "another class": ({"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)}, "SGD is not run"),
    "amsgrad": ({"optimizer": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True)}, "Adam is not run"),
    "its own class": ({"update": "torch"}, "AdamW is not run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_by_name_and_left_by_auto(tmp_path: Path, name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, "split", **options)
    assert files_of(fit(tmp_path, "auto", **options | {"max_steps": 1})).isdisjoint({LOW, TIE})


def test_a_negative_second_moment_is_refused(tmp_path: Path) -> None:
    first = fit(tmp_path, "fp32", max_steps=1, checkpoint="file")
    first.trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=False)
    content["optimizer_states"][0]["state"][0]["exp_avg_sq"].view(-1)[3] = -1e-9
    torch.save(content, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="second moment of Adam is negative"):
        fit(tmp_path, "split", max_steps=2, ckpt_path=str(tmp_path / "b.ckpt"))


def test_the_lines_in_the_docs_read_the_files(tmp_path: Path) -> None:
    """What docs/checkpoints.md gives other programs reads masters and second moments to the bit, ties too."""
    (code,) = (code for _, code in code_blocks(DOCS / "checkpoints.md", "python") if "def split(" in code)
    lines: dict[str, Any] = {}
    exec(code, lines)
    first = fit(tmp_path, "fp32", max_steps=1, checkpoint="file")
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    start = from_half(tmp_path / "first.ckpt", "half.ckpt")
    run = fit(tmp_path, "split", max_steps=1, checkpoint="links", ckpt_path=start)
    run.trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert_read(lines, tmp_path / "a.ckpt")
    fit(tmp_path, "bf16", max_steps=2, checkpoint="links").trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert_read(lines, tmp_path / "b.ckpt")
    fit(tmp_path, "int8", max_steps=2, checkpoint="links").trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert_read(lines, tmp_path / "c.ckpt")


def assert_read(lines: dict[str, Any], path: Path) -> None:
    """The functions in ``lines`` give the values that our reader gives."""
    with CheckpointReader(path) as reader:
        for name in reader.parameter_names:
            widths = {"U8": "u1", "U16": "u2", "BF16": "u2", "F32": "u4"}
            words = {
                kind: lines["read"](reader.path_of(record), name, widths[entry.dtype])
                for kind, (record, entry) in reader.manifest.parameters[name].items()
            }
            if TIE in words:
                found = dict(
                    zip(("master", "exp_avg_sq"), lines["split"](words["param"], words[LOW], words[TIE]), strict=True)
                )
                assert (words[TIE] >> 31).any() or len(words[TIE]) < 500
            elif FIRST_BF16 in words:
                found = {kind: lines["bf16"](words[f"{kind}.bf16"]) for kind in ("exp_avg", "exp_avg_sq")}
            else:
                found = {
                    kind: lines["log8"](words[f"{kind}.log8"], words[f"{kind}.scale"], kind == "exp_avg")
                    for kind in ("exp_avg", "exp_avg_sq")
                }
            if NUDGED in words:
                found["master"] = lines["nudged"](words["param"], words[NUDGED])
            for kind, values in found.items():
                ours = reader.tensor(name, kind).numpy().reshape(-1)
                assert np.array_equal(values.view("u4"), ours.view("u4")), (name, kind)
