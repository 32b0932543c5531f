"""How models come to be: in configure_model, on the meta device, from Hugging Face folders; and which are refused."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ssd.creation import materialize
from lightning_ssd.creation.materialize import ParamMaterializer
from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io.deadline import Patience
from lightning_ssd.io.folder import Folder
from lightning_ssd.io.scratch import Scratch
from lightning_ssd.strategy.for_lightning import SSDOffloadPrecision
from tests.conftest import REPOSITORY
from tests.helpers.hugging_face import Causal, make_folder
from tests.helpers.models import GPT
from tests.helpers.training import Module, Tokens, make_trainer, streamed


class Configured(Module):
    """Builds its net where Lightning wants large models to be built."""

    def __init__(self, make_net: Callable[[], nn.Module]) -> None:
        super().__init__(nn.Identity())
        self._make_net: Callable[[], nn.Module] | None = make_net

    def configure_model(self) -> None:
        if self._make_net is not None:
            self.net, self._make_net = self._make_net(), None


def fit(tmp_path: Path, module: Module, strategy: Any, data: Dataset[Any] | None = None, **kwargs: Any) -> Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(tmp_path, strategy, **({"max_steps": 4} | kwargs))
        trainer.fit(module, DataLoader(data or Tokens(32), batch_size=4))
    return module


def assert_same(a: Module, b: Module) -> None:
    assert a.losses == b.losses
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    assert not [name for name in x if not torch.equal(x[name], y[name])]


@pytest.mark.parametrize(("precision", "min_nbytes"), [("32-true", None), ("bf16-true", None), ("32-true", 0)])
def test_configure_model_is_as_under_plain_lightning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, min_nbytes: int | None
) -> None:
    if min_nbytes is not None:
        monkeypatch.setattr(materialize, "MIN_NBYTES", min_nbytes)
    results = []
    for ours in (False, True):
        pl.seed_everything(1, verbose=False)
        module = Configured(functools.partial(GPT, tie=True))
        # Without a master the 16-bit values themselves are updated, as in plain Lightning.
        plugin = SSDOffloadPrecision(precision, master_dtype="param")
        chosen: dict[str, Any] = {"plugins": plugin} if ours else {"precision": precision}
        results.append(fit(tmp_path, module, streamed() if ours else "auto", **chosen))
    assert_same(*results)


class _Seeded(nn.Linear):
    """Gets the same values whenever it is asked to initialise itself."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.linspace(-1, 1, self.weight.numel()).view_as(self.weight))
            self.bias.zero_()


class _FromMeta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(97, 16)
        self.blocks = nn.ModuleList(_Seeded(16, 16) for _ in range(3))
        self.norm = nn.BatchNorm1d(16)
        self.head = _Seeded(16, 97)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


def test_meta_device_in_configure_model(tmp_path: Path) -> None:
    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return _FromMeta()

    pl.seed_everything(1, verbose=False)
    module = fit(tmp_path, Configured(on_meta), streamed(), Tokens(4))  # one batch, again and again
    assert not [n for n, p in module.named_parameters() if p.is_meta or not torch.isfinite(p).all()]
    assert module.losses[-1] < module.losses[0]


def test_meta_without_reset_parameters_is_refused(tmp_path: Path) -> None:
    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return GPT()

    with pytest.raises(ConfigurationError, match=r"'net' \(GPT\).*reset_parameters"):
        fit(tmp_path, Configured(on_meta), streamed())


def test_a_checkpoint_gives_meta_parameters_their_values(tmp_path: Path) -> None:
    first = fit(tmp_path, Module(GPT(tie=True)), streamed())
    first.trainer.save_checkpoint(tmp_path / "saved.ckpt")

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return GPT(tie=True)

    module = Configured(on_meta)
    make_trainer(tmp_path, streamed()).validate(
        module, DataLoader(Tokens(4)), str(tmp_path / "saved.ckpt"), verbose=False
    )
    assert module.net.head.weight is module.net.tok.weight
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in module.state_dict().items())


def test_init_module_context(tmp_path: Path) -> None:
    results = []
    for strategy in ("auto", streamed()):
        pl.seed_everything(1, verbose=False)
        trainer = make_trainer(
            tmp_path, strategy, precision="bf16-true" if strategy == "auto" else "32-true", max_steps=3
        )
        with trainer.init_module():
            module = Module(GPT())
        results.append({p.dtype for p in module.parameters()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, DataLoader(Tokens(16), batch_size=4))
    assert results == [{torch.bfloat16}, {torch.float32}]


_LARGE = """
import json, os, re, sys, threading, warnings
import torch, lightning.pytorch as pl
from torch import nn
warnings.simplefilter("ignore")

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

class Large(pl.LightningModule):
    def configure_model(self):
        self.before = anonymous()
        self.layers = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(25)])  # 400 MiB
        self.after = anonymous()
    def training_step(self, batch, batch_idx):
        self.peak = max(getattr(self, "peak", 0), anonymous())
        return self.layers(batch).pow(2).mean()
    def on_after_backward(self):
        self.peak = max(self.peak, anonymous())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

module = Large()
strategy = __import__("lightning_ssd").SSDOffloadStrategy(host_memory="min")
trainer = pl.Trainer(strategy=strategy, accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1])
trainer.fit(module, torch.utils.data.DataLoader(torch.randn(4, 2048), batch_size=2))
plan = strategy.session.plan.host_nbytes
print(json.dumps({"built": module.after - module.before, "trained": module.peak - module.before, "plan": plan,
                  "rested": anonymous() - module.before}))
"""


def test_a_large_model_is_never_in_memory(tmp_store: Path) -> None:
    command = [sys.executable, "-c", _LARGE, str(tmp_store)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    grown = json.loads(done.stdout.splitlines()[-1])
    mib = 1 << 20
    assert grown["built"] < 64 * mib  # one layer is made in memory before it moves to its file
    assert grown["trained"] < grown["plan"] + 64 * mib
    assert grown["rested"] < 64 * mib


# -------------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hugging_face_models(tmp_path: Path, kind: str, precision: str) -> None:
    pytest.importorskip("transformers")
    folder = make_folder(tmp_path, kind)
    results = []
    for strategy in ("auto", streamed()):
        pl.seed_everything(1, verbose=False)
        module = Causal(folder)
        results.append(fit(tmp_path, module, strategy, precision=precision, gradient_clip_val=1.0, max_steps=6))
    assert_same(*results)


class MadeOnMeta(Causal):
    """A model with ties, from a configuration; plain Lightning needs the two lines that we do not."""

    def __init__(self, config: Any, is_plain: bool) -> None:
        Module.__init__(self, nn.Identity())
        self._config: Any = config
        self._is_plain = is_plain

    def configure_model(self) -> None:
        from transformers import AutoModelForCausalLM

        if self._config is not None:
            with torch.device("meta"):
                self.net = AutoModelForCausalLM.from_config(self._config).train()
            self._config = None
            if self._is_plain:
                self.net.to_empty(device="cpu")
                self.net.init_weights()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_initialise_themselves(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(make_folder(tmp_path, kind))
    config.vocab_size = 3000  # one tensor that is mapped
    results = []
    for strategy in ("auto", streamed()):
        pl.seed_everything(1, verbose=False)
        results.append(fit(tmp_path, MadeOnMeta(config, strategy == "auto"), strategy, max_steps=3))
    assert_same(*results)


class Forgets(nn.Module):
    """Initialises a part of itself only."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.up = nn.Linear(8, 300)
        self.down = nn.Linear(300, 300)
        self.register_buffer("places", torch.arange(4))
        self.what = what
        if what == "plain":
            self.plain = torch.ones(2)

    def _init_weights(self, module: nn.Module) -> None:
        """As old code does it, which no version tells."""
        for name, param in module.named_parameters(recurse=False):
            if self.what not in (name, f"large {name}") or (param.numel() > 65536) != self.what.startswith("large"):
                param.data.zero_() if name == "bias" else param.data.normal_()
        if module is self and self.what != "places":
            self.places.copy_(torch.arange(4))

    def init_weights(self) -> None:
        self.apply(self._init_weights)


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ("bias", "up.bias, down.bias"),
        ("large weight", "down.weight"),
        ("places", "places"),
        ("plain", ".plain"),
        ("", ""),
    ],
)
def test_what_a_model_leaves_without_values_is_refused(tmp_path: Path, what: str, left: str) -> None:
    with torch.device("meta"):
        root = nn.Sequential(Forgets(what))
    with closing(Folder.open(str(tmp_path))) as folder:
        materializer = ParamMaterializer(Scratch(folder, False, Patience(60)), torch.device("cpu"))
        if left:
            with pytest.raises(
                ConfigurationError, match=rf"its init_weights\(\) leaves {left} without values; build it"
            ):
                materializer.materialize(root)
        else:
            materializer.materialize(root)
            assert all(param.isfinite().all() for param in root.parameters())
            assert root[0].places.tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------- refused


def test_scripted_modules_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(ConfigurationError, match=r"TorchScript"):
        fit(tmp_path, Module(nn.Sequential(nn.Linear(4, 4), scripted)), streamed())


# ------------------------------------------------------------------------------------------ the other namespace


def test_pytorch_lightning_is_the_same(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    pytest.importorskip("pytorch_lightning")
    code = f"""
import warnings, logging
warnings.simplefilter("ignore")
logging.disable(logging.INFO)
import pytorch_lightning as pl, torch
from torch import nn

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)], nn.Linear(8, 1))
    def training_step(self, batch, batch_idx):
        return self.blocks(batch).pow(2).mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

def run(strategy):
    pl.seed_everything(0)
    net = Net()
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", max_steps=5, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.1,
        default_root_dir={str(tmp_path)!r})
    trainer.fit(net, torch.utils.data.DataLoader(torch.randn(20, 8), batch_size=4))
    trainer.save_checkpoint({str(tmp_path / "saved.ckpt")!r})
    return net.state_dict()

from lightning_ssd import SSDOffloadStrategy
assert issubclass(SSDOffloadStrategy, pl.strategies.Strategy)
plain, ours = run("auto"), run(SSDOffloadStrategy(host_memory="min", min_unit_numel=0, update="torch"))
print(all(torch.equal(plain[name], ours[name]) for name in plain))
"""
    assert fresh_python(code).split()[-1] == "True"
