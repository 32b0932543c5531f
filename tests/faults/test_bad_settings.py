"""Settings, machines and models that cannot work: one error that names the thing, the numbers and the way out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from torch import nn

from lightning_ssd.errors import ConfigurationError, MemoryPlanError, StoreError
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.strategy.for_lightning import SSDOffloadPrecision, SSDOffloadStrategy
from tests.faults.support import refused, run_directories, small_gpt, streamed
from tests.helpers.training import Module, Tokens, adamw, make_trainer, train


@pytest.fixture(autouse=True)
def _nothing_is_lost(tmp_path: Path) -> Iterator[None]:
    """Of a run that was refused nothing is left, though the Trainer and its error may still be alive."""
    yield
    assert run_directories(tmp_path / ".ssd_offload") == []


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"activations": "none"}, ("activations='none' is unknown", "'recompute', 'keep'")),
        ({"overlap": True}, ("overlap=True is unknown", "'auto', 'off'")),
        ({"update": "fused"}, ("update='fused' is unknown", "'native', 'torch'")),
        ({"state": "int4"}, ("state='int4' is unknown", "'fp32'")),
        ({"verify_reads": "yes"}, ("verify_reads='yes' is unknown", "True, False")),
        ({"verify_reads": 1}, ("verify_reads=1 is unknown",)),
        ({"window": 0}, ("window=0 is unknown", "from 1")),
        ({"window": True}, ("window=True is unknown", "from 1")),
        ({"min_unit_numel": -1}, ("min_unit_numel=-1",)),
        ({"min_unit_numel": "1M"}, ("min_unit_numel='1M'", "number of elements")),
        ({"keep_store": "no"}, ("keep_store='no' is unknown", "True, False")),
        ({"device_memory": "8GiB"}, ("device_memory='8GiB' bounds the memory of a GPU", "'auto'")),
        ({"host_memory": "lots"}, ("host_memory: cannot read 'lots'", "'16GiB'", "'auto' or 'min'")),
        ({"host_memory": -1}, ("host_memory: a size cannot be negative",)),
        ({"host_memory": 1.5}, ("host_memory: cannot read 1.5",)),
        ({"host_memory": "4096TiB"}, ("host_memory='4096TiB' is 4503599627370496 bytes", "can take", "smaller")),
        ({"nvme_path": []}, (r"nvme_path=\[\]", "a directory")),
        ({"nvme_path": 7}, ("nvme_path=7", "a directory")),
        ({"units": ["Blok"]}, (r"units names the class\(es\) \['Blok'\]", "it has: Block, Dropout")),
        ({"units": 3}, ("units=3", "class names")),
        ({"io": {"engine": "posix"}}, ("io=", "IOOptions")),
        ({"io": IOOptions(engine="dma")}, ("io option engine='dma'", "uring")),  # type: ignore[arg-type]
        ({"io": IOOptions(depth=0)}, ("io option depth=0", "1 to 4096")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_honoured(tmp_path: Path, settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(tmp_path, streamed(**settings), *parts, error=ConfigurationError)


def test_a_path_named_twice(tmp_path: Path) -> None:
    paths = [str(tmp_path / "a"), str(tmp_path / "b" / ".." / "a")]
    refused(tmp_path, streamed(nvme_path=paths), "names a directory twice", error=ConfigurationError)


def test_too_little_memory_names_the_smallest_that_works(tmp_path: Path) -> None:
    error = refused(tmp_path, streamed(host_memory="1MiB"), r"host_memory=1\.00 MiB", "units=", error=MemoryPlanError)
    named = re.search(r"Set host_memory to at least (\w+)", str(error))
    exact = re.search(r"\((\d+) bytes\)", str(error))
    assert named is not None
    assert exact is not None
    for works_with in (named[1], int(exact[1])):
        strategy = streamed(host_memory=works_with, nvme_path=str(tmp_path / "store"))
        train(tmp_path, small_gpt, strategy, max_steps=2)
    refused(tmp_path, streamed(host_memory=int(exact[1]) - 1), "cannot work", error=MemoryPlanError)


def rmsprop(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(module.parameters())


def test_a_model_that_was_refused_trains_with_the_right_settings_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Refused at the settings, while it was placed, by its optimizer, by the plan, and in its first step."""
    expected = train(tmp_path, small_gpt, streamed(nvme_path=str(tmp_path / "store")), max_steps=3)
    pl.seed_everything(1, verbose=False)
    module = Module(small_gpt())
    loader = torch.utils.data.DataLoader(Tokens(400), batch_size=4, shuffle=True)
    for number, settings in enumerate(
        ({"window": 0}, {"units": ["Blok"]}, {"update": "native"}, {"host_memory": "1MiB"}, {"activations": "keep"})
    ):
        module._make_optimizer = rmsprop if "update" in settings else adamw
        hooks = [module.net.head.register_forward_hook(lambda *_: 1 / 0)] if number == 4 else []
        trainer = make_trainer(tmp_path, streamed(**settings, nvme_path=str(tmp_path / "store")))
        with pytest.raises((ConfigurationError, MemoryPlanError, ZeroDivisionError)):
            trainer.fit(module, loader)
        for hook in hooks:
            hook.remove()
        module._make_optimizer = adamw
    pl.seed_everything(1, verbose=False)
    small_gpt()  # draws what made the initial weights
    module.losses.clear()
    make_trainer(tmp_path, streamed(nvme_path=str(tmp_path / "store")), max_steps=3).fit(module, loader)
    assert module.losses == expected.losses


# ------------------------------------------------------------------------------------------------------------- places


def test_no_permission(tmp_path: Path) -> None:
    """The tests may run as root, who may write anywhere but here."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/lightning-ssd")):
        parts = (f"nvme_path='{path}'", "local disk that this user may write to")
        refused(tmp_path, streamed(nvme_path=str(path)), *parts, error=StoreError)


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def nearly_full(path: Any) -> Any:
        found = list(real(path))
        found[3] = found[4] = 5  # free blocks
        return os.statvfs_result(found)

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", nearly_full)
        parts = ("placing the parameters needs", "has 20.00 KiB free", "another nvme_path")
        refused(tmp_path, streamed(), *parts, error=StoreError)


def test_memory_as_a_disk_is_allowed_and_warned_of(tmp_path: Path) -> None:
    path = Path("/dev/shm") / f"lightning-ssd-test-{os.getpid()}"
    try:
        module, trainer = Module(small_gpt()), make_trainer(tmp_path, streamed(nvme_path=str(path)), max_steps=1)
        loader = torch.utils.data.DataLoader(Tokens(8), batch_size=4)
        with pytest.warns(UserWarning, match=rf"nvme_path='{path}' is on tmpfs, which is in memory"):
            trainer.fit(module, loader)
        trainer.strategy.session.close()  # type: ignore[attr-defined]
    finally:
        path.rmdir()


OTHER = """
import sys
from pathlib import Path
from tests.faults.support import streamed, works
from tests.helpers.training import train
from tests.faults.support import small_gpt
result = train(Path(sys.argv[1]), small_gpt, streamed(nvme_path=sys.argv[2], keep_store=True), max_steps=2)
print("trained", flush=True)
sys.stdin.read()
"""


def test_two_runs_share_a_path_and_a_dead_one_is_reported(tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "-c", OTHER, str(tmp_path / "other"), str(store)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        assert any("trained" in line for line in other.stdout)
        theirs = run_directories(store)
        module, loader = Module(small_gpt()), torch.utils.data.DataLoader(Tokens(8), batch_size=4)
        trainer = make_trainer(tmp_path, streamed(nvme_path=str(store)), max_steps=2)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*earlier run")
            trainer.fit(module, loader)
        trainer.strategy.session.close()  # type: ignore[attr-defined]
        other.kill()
    assert run_directories(store) == theirs
    trainer = make_trainer(tmp_path, streamed(nvme_path=str(store)), max_steps=1)
    with pytest.warns(UserWarning, match=rf"1 earlier run\(s\) .* hold .*iB in .*lightning-ssd clean {store}"):
        trainer.fit(Module(small_gpt()), loader)
    trainer.strategy.session.close()  # type: ignore[attr-defined]
    assert run_directories(store) == theirs  # reported, not removed


# ------------------------------------------------------------------------------------------------- trainer and machine


@pytest.mark.parametrize("asked", [{"devices": 2}, {"num_nodes": 2}])
@pytest.mark.compatibility("Refused", "several devices, nodes or processes: devices=1, num_nodes=1")
def test_more_than_one_process(tmp_path: Path, asked: dict[str, int]) -> None:
    refused(tmp_path, streamed(), "devices=1", error=ConfigurationError, **asked)


@pytest.mark.compatibility("Refused", "an accelerator that is neither CPU nor CUDA: one of these")
@pytest.mark.parametrize("name", ["mps", "xpu"])
def test_a_device_without_a_route(tmp_path: Path, name: str) -> None:
    strategy = streamed()
    strategy.parallel_devices = [torch.device(name)]
    refused(tmp_path, strategy, "accelerator='cpu' or 'gpu'", f"not on {name!r}", error=ConfigurationError)


class _OwnFormat(TorchCheckpointIO):
    pass


@pytest.mark.parametrize("plugin", [_OwnFormat(), AsyncCheckpointIO(_OwnFormat())])
@pytest.mark.compatibility("Refused", 'a checkpoint plugin beside checkpoint="links": checkpoint="file"')
def test_a_checkpoint_plugin_where_links_are_asked_for(tmp_path: Path, plugin: CheckpointIO) -> None:
    inner = getattr(plugin, "checkpoint_io", plugin)
    parts = (f"plugin {type(inner).__name__} writes checkpoints itself", "use checkpoint='file'")
    refused(tmp_path, streamed(checkpoint="links"), *parts, error=ConfigurationError, plugins=[plugin])


@pytest.mark.compatibility("Refused", "SSDOffloadPrecision of an unknown precision: one of the known")
def test_a_precision_that_is_not_supported(tmp_path: Path) -> None:
    for precision in ("fp8", "64-mixed"):
        with pytest.raises(ConfigurationError, match=rf"precision='{precision}' is not supported .* 32-true, bf16-mix"):
            train(tmp_path, small_gpt, streamed(), plugins=[SSDOffloadPrecision(precision)])


# -------------------------------------------------------------------------------------------------------------- models


class Special(nn.Parameter):
    pass


def sparse_gpt() -> nn.Module:
    net = small_gpt()
    net.tok = nn.Embedding(97, 16, sparse=True)
    return net


def lazy() -> nn.Module:
    return nn.Sequential(nn.Embedding(97, 16), nn.LazyLinear(97))


def special() -> nn.Module:
    net = small_gpt()
    net.head.weight = Special(net.head.weight.data)
    return net


@pytest.mark.parametrize(
    ("make_net", "parts"),
    [
        (lazy, ("parameter 'net.1.weight' has no shape yet", "run one forward")),
        (special, ("parameter 'net.head.weight' is a Special", "without quantised or wrapped")),
        (sparse_gpt, ("parameter 'net.tok.weight' has a sparse gradient", "sparse=False")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.compatibility("Refused", "lazy, quantised or wrapped parameters, sparse gradients: plain parameters")
def test_a_model_that_cannot_be_streamed(
    tmp_path: Path, make_net: Callable[[], nn.Module], parts: tuple[str, ...]
) -> None:
    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in module.parameters() if type(p) is not nn.UninitializedParameter], lr=0.1)

    strategy = streamed(nvme_path=str(tmp_path / "store"))
    refused(tmp_path, strategy, *parts, error=ConfigurationError, make_net=make_net, optimizer=sgd)


@pytest.mark.parametrize(
    ("make", "update", "parts"),
    [
        (lambda m: torch.optim.SparseAdam(m.parameters()), "auto", ("optimizer SparseAdam", "sparse gradients")),
        (
            lambda m: torch.optim.Adam(m.parameters(), amsgrad=True),
            "native",
            ("update='native' cannot run Adam: it has amsgrad=True", "update='torch' or 'auto'"),
        ),
        (
            lambda m: torch.optim.RMSprop(m.parameters()),
            "native",
            ("update='native' cannot run RMSprop", "only Adam, AdamW"),
        ),
        (
            lambda m: torch.optim.SGD([nn.Parameter(torch.zeros(3, 5))], lr=0.1),
            "auto",
            (r"optimizer SGD is given a parameter of shape \(3, 5\)", "register it"),
        ),
    ],
    ids=["SparseAdam", "amsgrad", "RMSprop", "foreign"],
)
@pytest.mark.compatibility("Refused", "SparseAdam; an optimizer that changes nothing: a dense optimizer")
def test_an_optimizer_that_cannot_be_streamed(
    tmp_path: Path, make: Callable[[nn.Module], torch.optim.Optimizer], update: str, parts: tuple[str, ...]
) -> None:
    strategy = streamed(update=update)
    refused(tmp_path, strategy, *parts, error=ConfigurationError, optimizer=make, schedule=False)


def test_the_strategy_may_be_built_anywhere_with_anything() -> None:
    """The command line builds strategies only to print their configuration."""
    SSDOffloadStrategy(nvme_path="/proc/none", host_memory="?", update="?")  # type: ignore[arg-type]
