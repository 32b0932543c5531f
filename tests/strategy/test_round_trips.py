"""Whole chains through other programs' formats and back: at the end every tensor is what it has to be, to the bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.cli.main import main
from lightning_ssd.kernels import api as kernels
from tests.helpers.hugging_face import Causal, make_folder
from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, adamw, make_trainer, streamed


class _Seeds(pl.Callback):
    """Dropout of a step depends on the step alone, as no plain ``.ckpt`` holds the state of random generators."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


def fit(path: Path, strategy: Any, module: Module, steps: int, ckpt_path: Path | None = None) -> pl.Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(path, strategy, max_steps=steps, callbacks=[_Seeds()], gradient_clip_val=1.0)
        trainer.fit(module, DataLoader(Tokens(12), batch_size=4), ckpt_path=ckpt_path)
    return trainer


def lightning_ssd(*arguments: object) -> None:
    assert main(list(map(str, arguments))) == 0


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same names, and tensors of the same dtype, shape and bits."""
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if found[name].dtype != value.dtype]
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


# -------------------------------------------------------------------------- Hugging Face -> train -> Hugging Face


def from_pretrained(folder: Path) -> nn.Module:
    """The model, which must have got each of its tensors from the folder, and all that is in the folder."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model


def tensors_of(module: Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.net.state_dict().items()}


def export(checkpoint: Path, folder: Path, config: Path) -> None:
    """Export, and check that configuration and the like came along as they are."""
    lightning_ssd("export", checkpoint, folder, "--config-from", config)
    others = [path for path in config.iterdir() if path.suffix != ".safetensors"]
    assert len(others) >= 3
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in others)


@pytest.fixture(params=["gpt2", "llama"])
def pretrained(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder whose weights are tied (gpt2) or not (llama), with a tokenizer's file."""
    pytest.importorskip("transformers")
    folder = make_folder(tmp_path / "source", request.param)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_hugging_face_folder_is_trained_and_exported(tmp_path: Path, pretrained: Path) -> None:
    module = Causal(pretrained)
    trainer = fit(tmp_path, streamed(), module, 4)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    export(tmp_path / "trained.ckpt", tmp_path / "out", pretrained)
    plain = Causal(pretrained)
    fit(tmp_path, "auto", plain, 4)
    assert module.losses == plain.losses
    trained = tensors_of(plain)
    assert_equal(tensors_of(module), trained)
    assert_equal(from_pretrained(tmp_path / "out").state_dict(), trained)
    again = Causal(tmp_path / "out")  # and the way may be gone once more
    fit(tmp_path, streamed(), again, 1)
    before = load_file(pretrained / "model.safetensors")
    assert not torch.equal(trained[name := next(iter(before))], before[name])


def test_a_hugging_face_folder_comes_out_as_it_went_in(tmp_path: Path, pretrained: Path) -> None:
    """Without a step, and through ``lightning-ssd import`` too."""
    trainer = make_trainer(tmp_path, streamed())
    trainer.validate(module := Causal(pretrained), DataLoader(Tokens(4), batch_size=4), verbose=False)
    trainer.save_checkpoint(tmp_path / "opened.ckpt")
    export(tmp_path / "opened.ckpt", tmp_path / "opened", pretrained)
    lightning_ssd("import", pretrained, tmp_path / "imported.ckpt")
    lightning_ssd("export", tmp_path / "imported.ckpt", tmp_path / "imported", "--config-from", pretrained)
    source = load_file(pretrained / "model.safetensors")
    expected = from_pretrained(pretrained).state_dict()
    for folder in (tmp_path / "opened", tmp_path / "imported"):
        found = load_file(folder / "model.safetensors")
        assert_equal(found, source)
        assert_equal(from_pretrained(folder).state_dict(), expected)
    assert_equal(tensors_of(module), expected)


def test_a_hugging_face_folder_is_imported_and_trained(tmp_path: Path, pretrained: Path) -> None:
    """Into a model that began with other weights, whose own checkpoint says what it is."""
    other = make_folder(tmp_path / "other", pretrained.name, seed=1)
    fit(tmp_path, streamed(), Causal(other), 1).save_checkpoint(tmp_path / "like.ckpt")
    target = tmp_path / "imported.ckpt"
    lightning_ssd("import", pretrained, target, "--like", tmp_path / "like.ckpt")
    export(target, tmp_path / "untrained", pretrained)
    assert_equal(from_pretrained(tmp_path / "untrained").state_dict(), from_pretrained(pretrained).state_dict())
    module = Causal(other)
    fit(tmp_path, streamed(), module, 4, target).save_checkpoint(tmp_path / "trained.ckpt")
    export(tmp_path / "trained.ckpt", tmp_path / "out", pretrained)
    plain = Causal(pretrained)
    fit(tmp_path, "auto", plain, 4)
    assert module.losses == plain.losses
    assert_equal(from_pretrained(tmp_path / "out").state_dict(), tensors_of(plain))


# -------------------------------------------------------------------- .ckpt -> ssd_offload -> .ckpt -> plain Lightning


def for_loop_adamw(module: nn.Module) -> torch.optim.Optimizer:
    """Torch's for-loop, whose bits the native kernel gives."""
    optimizer = adamw(module)
    for group in optimizer.param_groups:
        group["foreach"] = False
    return optimizer


class ByStep(Module):
    """The batch of a step depends on its number alone: plain Lightning goes on with the data somewhere else."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        data = Tokens(36)
        rows = [data[4 * self.global_step + row] for row in range(4)]
        x, y = (torch.stack([row[i] for row in rows]).to(self.device) for i in (0, 1))
        return super().training_step((x, y), batch_idx)


def make_module() -> Module:
    torch.manual_seed(11)
    module = ByStep(GPT(tie=True, dropout=0.1), for_loop_adamw)
    module.register_buffer("kept", torch.arange(5))
    return module


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """One optimizer's state, as ``state_dict`` gives it."""
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for number, entry in expected["state"].items():
        assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert_equal(found["state"][number], entry)


@pytest.mark.parametrize("update", ["torch", "native"])
def test_a_plain_checkpoint_goes_through_and_on_under_plain_lightning(tmp_path: Path, update: str) -> None:
    if update == "native" and not kernels.is_bit_equal_to_torch():
        pytest.skip("the native kernel gives other bits than torch on this machine")
    whole, first, ours, last = (make_module() for _ in range(4))
    plain = fit(tmp_path, "auto", whole, 9)
    fit(tmp_path, "auto", first, 3).save_checkpoint(tmp_path / "plain-3.ckpt")
    # Lightning counts the batches of a resumed run otherwise than those of a whole one, so this one is resumed too.
    fit(tmp_path, "auto", make_module(), 6, tmp_path / "plain-3.ckpt").save_checkpoint(tmp_path / "plain-6.ckpt")

    streaming = fit(tmp_path, streamed(update=update), ours, 6, tmp_path / "plain-3.ckpt")
    streaming.save_checkpoint(tmp_path / "ours-6.ckpt")
    with CheckpointReader(tmp_path / "ours-6.ckpt") as reader:
        assert reader.manifest.step == 6
    lightning_ssd("export", tmp_path / "ours-6.ckpt", tmp_path / "exported-6.ckpt")
    resumed = fit(tmp_path, "auto", last, 9, tmp_path / "exported-6.ckpt")

    exported, expected = (torch.load(tmp_path / f"{name}-6.ckpt") for name in ("exported", "plain"))
    assert exported.keys() - expected.keys() == {"ssd_offload_resume"}  # random generators; others do not look at it
    assert not expected.keys() - exported.keys()
    for key in ("epoch", "global_step", "loops", "lr_schedulers"):
        assert exported[key] == expected[key], key
    assert_equal(exported["state_dict"], expected["state_dict"])
    assert_same_state(exported["optimizer_states"][0], expected["optimizer_states"][0])

    assert first.losses + ours.losses + last.losses == whole.losses
    assert_equal(last.state_dict(), whole.state_dict())
    assert_same_state(resumed.optimizers[0].state_dict(), plain.optimizers[0].state_dict())
    schedules = [trainer.lr_scheduler_configs[0].scheduler.state_dict() for trainer in (resumed, plain)]
    assert schedules[0] == schedules[1]
    assert resumed.global_step == plain.global_step == 9
