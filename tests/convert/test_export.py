"""Exports are read by the programs they are for: torch, Lightning, safetensors, transformers."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

from lightning_ssd.checkpoint.contents import CheckpointContent
from lightning_ssd.checkpoint.manifest import OptimizerRecord
from lightning_ssd.convert.export import consolidate, to_safetensors
from lightning_ssd.errors import CheckpointError
from lightning_ssd.saving.write import write_checkpoint
from tests.checkpoint.support import Training, write_generation


class Model(pl.LightningModule):
    """Two parameter groups in another order than the module's, a buffer, tied weights."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokens = 7
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, width)
        self.last.weight = self.first.weight

    def get_extra_state(self) -> dict[str, int]:
        return {"tokens": self.tokens}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.tokens = state["tokens"]

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = (self.last(self.norm(self.first(batch))) - batch).square().mean()
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.norm.weight, self.norm.bias], "weight_decay": 0.0}]
        groups.append({"params": [self.first.bias, self.first.weight, self.last.bias]})
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def fit(model: Model, epochs: int, folder: Path, ckpt_path: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    data = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    trainer.fit(model, DataLoader(data, batch_size=4), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return trainer


def checkpoint_of(model: Model, trainer: pl.Trainer, folder: Path) -> Path:
    """What the strategy does when Lightning saves."""
    content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    (optimizer,) = trainer.optimizers
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{**g, "params": [names[p] for p in g["params"]]} for g in optimizer.param_groups]
    state = {names[p]: {"step": float(s["step"])} for p, s in optimizer.state.items()}
    (folder / "live").mkdir()
    files = []
    for unit in ("first", "norm", "last"):
        mine = {name: p for p, name in names.items() if name.startswith(unit)}
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            tensors = {n: (p.detach() if kind == "master" else optimizer.state[p][kind]) for n, p in mine.items()}
            files.append(write_generation(folder / "live" / f"{unit}.{kind}", tensors, unit=unit, kind=kind))
    record = OptimizerRecord("torch.optim.adamw.AdamW", groups, state, ["exp_avg", "exp_avg_sq"])
    rest = dict(model.named_buffers())
    content["state_dict_extra"] = {"_extra_state": {"tokens": 7}}
    content["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{}]  # of a loader the strategy made resumable
    del content["state_dict"], content["optimizer_states"]
    write_checkpoint(
        folder / "c",
        CheckpointContent(
            files, rest, content, [record], step=trainer.global_step, aliases={"last.weight": "first.weight"}
        ),
    )
    return folder / "c"


def test_lightning_loads_and_resumes_a_consolidated_file(tmp_store: Path) -> None:
    torch.manual_seed(1)
    model = Model()
    trainer = fit(model, 2, tmp_store)
    plain = tmp_store / "plain.ckpt"
    trainer.save_checkpoint(plain)
    out = tmp_store / "out.ckpt"
    consolidate(checkpoint_of(model, trainer, tmp_store), out)

    ours, theirs = (torch.load(path) for path in (out, plain))
    assert set(ours) == set(theirs)
    assert set(ours["state_dict"]) == set(theirs["state_dict"])
    assert ours["optimizer_states"][0]["param_groups"] == theirs["optimizer_states"][0]["param_groups"]
    state, expected = (x["optimizer_states"][0]["state"] for x in (ours, theirs))
    assert sorted(state) == sorted(expected)
    for number, entry in expected.items():
        assert set(state[number]) == set(entry)
        assert all(torch.equal(state[number][key], entry[key]) for key in entry)
    assert ours["state_dict"]["last.weight"].data_ptr() == ours["state_dict"]["first.weight"].data_ptr()

    loaded = Model.load_from_checkpoint(out)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    losses = []
    for path in (plain, out):
        resumed = Model()
        fit(resumed, 4, tmp_store, ckpt_path=path)
        losses.append(resumed.losses)
    assert losses[0] == losses[1]
    with pytest.raises(CheckpointError, match="exists"):
        consolidate(tmp_store / "c", out)
    assert not [name for name in os.listdir(tmp_store) if "tmp" in name]


def test_transformers_loads_an_exported_folder(tmp_store: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=False,
        )
    )  # fmt: skip
    tokens = torch.arange(10)[None]
    for name, model, dtype in (("gpt2", gpt2, torch.float32), ("llama", llama.bfloat16(), torch.bfloat16)):
        model.eval()
        folder = tmp_store / name
        folder.mkdir()
        wrapped = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
        # As under bf16-true: the parameter itself is bf16, only the float32 master is in the checkpoint.
        unit = write_generation(folder / "u", {n: p.float() for n, p in wrapped.items()}, unit="all", kind="master")
        every = {f"model.{n}" for n in model.state_dict()}
        aliases = {"model.lm_head.weight": "model.transformer.wte.weight"} if every - set(wrapped) else {}
        dtypes = {n: "BF16" for n in wrapped} if dtype == torch.bfloat16 else {}
        write_checkpoint(
            folder / "c",
            CheckpointContent([unit], {"weight": torch.ones(3)}, {}, [], step=1, aliases=aliases, dtypes=dtypes),
        )
        model.config.save_pretrained(folder / "config")
        (folder / "config" / "model.safetensors").write_text("not this one")
        report = to_safetensors(
            folder / "c", folder / "hf", prefix_to_strip="model.", config_from=folder / "config", max_shard=1500
        )
        assert report.left_out == ("weight",)
        assert len(report.files) > 2
        loaded, info = type(model).from_pretrained(folder / "hf", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert next(loaded.parameters()).dtype == dtype
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
        consolidate(folder / "c", folder / "out.ckpt")
        content = torch.load(folder / "out.ckpt")
        assert all(torch.equal(content["state_dict"][n], p) for n, p in wrapped.items())
        assert {t.dtype for n, t in content["state_dict"].items() if n in wrapped} == {dtype}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert", "bart", "albert", "opt"])
def test_names_are_those_of_save_pretrained(tmp_store: Path, kind: str) -> None:
    """With the LightningModule's attribute and torch.compile's in them; read by `AutoModel` as what was saved."""
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes: dict[str, dict[str, Any]] = {
        "gpt2": {"vocab_size": 40, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2},
        "llama": small | {"intermediate_size": 12, "num_key_value_heads": 2},
        "t5": {"vocab_size": 40, "d_model": 8, "d_ff": 12, "d_kv": 4, "num_layers": 2, "num_heads": 2},
        "bert": small | {"intermediate_size": 12, "max_position_embeddings": 16},
        "albert": small | {"intermediate_size": 12, "max_position_embeddings": 16, "embedding_size": 8},
        "opt": small | {"ffn_dim": 12, "max_position_embeddings": 16, "word_embed_proj_dim": 8},
        "bart": {
            "vocab_size": 40, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12,
            "decoder_ffn_dim": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "max_position_embeddings": 16,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes[kind], pad_token_id=0)
    auto = transformers.AutoModelForMaskedLM if kind in ("bert", "albert") else transformers.AutoModelForCausalLM
    auto = transformers.AutoModelForSeq2SeqLM if kind in ("t5", "bart") else auto
    model = auto.from_config(config)
    model.save_pretrained(tmp_store / "saved")
    front = "net._orig_mod."
    tensors = {f"{front}{n}": t for n, t in model.state_dict(keep_vars=True).items()}
    first: dict[torch.Tensor, str] = {}
    aliases = {n: first[t] for n, t in tensors.items() if first.setdefault(t, n) != n}
    params = {n: t.detach() for n, t in tensors.items() if isinstance(t, nn.Parameter) and n not in aliases}
    buffers = {n: t for n, t in tensors.items() if not isinstance(t, nn.Parameter)}
    unit = write_generation(tmp_store / "u", params, unit="all", kind="param")
    content = CheckpointContent(
        [unit], {"metric.count": torch.ones(1)} | buffers, {"loops": {}}, [], step=1, aliases=aliases
    )
    write_checkpoint(tmp_store / "c", content)
    report = to_safetensors(tmp_store / "c", tmp_store / "hf", config_from=tmp_store / "saved")
    assert (report.prefix, report.left_out) == ("net.", ("metric.count",))
    with safe_open(report.files[0], "pt") as ours, safe_open(tmp_store / "saved" / "model.safetensors", "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.get_tensor(n), theirs.get_tensor(n)) for n in theirs.keys())  # noqa: SIM118
    loaded, info = auto.from_pretrained(tmp_store / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_tied_tensor_has_all_its_names_where_the_configuration_unties_it(tmp_store: Path) -> None:
    unit = write_generation(tmp_store / "u", {"net.a._orig_mod.w": torch.ones(2)}, unit="all", kind="param")
    content = CheckpointContent([unit], {}, {"loops": {}}, [], step=1, aliases={"net.b.w": "net.a._orig_mod.w"})
    write_checkpoint(tmp_store / "c", content)
    (tmp_store / "config").mkdir()
    for tied, expected in (("true", {"a.w"}), ("false", {"a.w", "b.w"}), ("Infinity", {"a.w"})):
        (tmp_store / "config" / "config.json").write_text(f'{{"tie_word_embeddings": {tied}}}')
        report = to_safetensors(tmp_store / "c", tmp_store / tied, config_from=tmp_store / "config")
        with safe_open(report.files[0], "pt") as file:
            assert set(file.keys()) == expected
    (tmp_store / "config" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json' is no JSON"):
        to_safetensors(tmp_store / "c", tmp_store / "x", config_from=tmp_store / "config")


def test_one_file_if_it_fits(training: Training, tmp_store: Path) -> None:
    training.save(tmp_store / "c")
    report = to_safetensors(tmp_store / "c", tmp_store / "hf")
    assert [os.path.basename(path) for path in report.files] == ["model.safetensors"]
    with safe_open(report.files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {"a.weight", "a.none", "b.scale", "b.bias", "buffer"}  # head.weight is tied
        assert torch.equal(file.get_tensor("a.weight"), training.tensors("a", "master", 1)["a.weight"])
    with pytest.raises(CheckpointError, match="no tensor"):
        to_safetensors(tmp_store / "c", tmp_store / "other", prefix_to_strip="nothing.")
    with pytest.raises(CheckpointError, match=r"exists|not replaced"):
        to_safetensors(tmp_store / "c", tmp_store / "c")


class AnonymousMemory:
    """Peak of anonymous memory, in bytes, while it is entered; sampled every 2 ms."""

    def __enter__(self) -> AnonymousMemory:
        self.start_nbytes = self.peak_nbytes = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth_nbytes(self) -> int:
        return self.peak_nbytes - self.start_nbytes

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak_nbytes = max(self.peak_nbytes, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def test_no_memory_in_proportion_to_the_model(tmp_store: Path) -> None:
    nbytes = 192 << 20
    path = tmp_store / "big"
    tensors = {f"w{i}": torch.full((nbytes // 32,), float(i)) for i in range(8)}
    unit = write_generation(path, tensors, unit="u", kind="master")
    del tensors
    dtypes = {f"w{i}": "BF16" for i in range(4)}  # half of it has to be converted
    write_checkpoint(tmp_store / "c", CheckpointContent([unit], {}, {}, [], step=1, dtypes=dtypes))
    with AnonymousMemory() as memory:
        consolidate(tmp_store / "c", tmp_store / "out.ckpt")
        to_safetensors(tmp_store / "c", tmp_store / "hf")
    # Slack: one converted tensor (12 MiB), a piece on its way, Python's own.
    assert memory.growth_nbytes < 48 << 20
