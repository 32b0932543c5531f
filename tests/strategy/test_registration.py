"""The name "ssd_offload" without an import: found by every Lightning, felt by nobody else.

What matters is the state of imports, so each test runs in an interpreter of its own. Those that need no real Lightning
use one of a few lines, which starts a hundred times faster.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., str]
REPOSITORY = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------- with a toy Lightning

REGISTRY = """
class Registry(dict):
    def register(self, name, strategy, description="", override=False):
        if dict.__contains__(self, name) and not override:
            raise ValueError(name)
        self[name] = strategy
"""
TOY = {
    "lightning/__init__.py": "",
    "lightning/pytorch/__init__.py": "import lightning.pytorch.strategies, lightning.pytorch.trainer",
    "lightning/pytorch/strategies/__init__.py": REGISTRY + "StrategyRegistry = Registry()\n",
    "lightning/pytorch/trainer.py": "",
    "lightning/pytorch/cli.py": "",
    "lightning/fabric/__init__.py": "",
    "lightning/fabric/strategies/__init__.py": REGISTRY + "STRATEGY_REGISTRY = Registry()\n",
    "pytorch_lightning/__init__.py": "import pytorch_lightning.strategies, pytorch_lightning.trainer",
    "pytorch_lightning/strategies/__init__.py": REGISTRY + "StrategyRegistry = Registry()\n",
    "pytorch_lightning/trainer.py": "",
    "lightning_fabric/__init__.py": "",
    "lightning_fabric/strategies.py": REGISTRY + "STRATEGY_REGISTRY = Registry()\n",
    "torch/__init__.py": "import torch.serialization",
    "torch/serialization.py": "ADMITTED = []\nadd_safe_globals = ADMITTED.extend\n",
    "after.py": "",
}
NAMES = "['ssd_offload', 'ssdoffloadstrategy', 'lightning_ssd.ssdoffloadstrategy']"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A directory with packages that are to this one what Lightning's four are."""
    for name, text in TOY.items():
        (tmp_path / "toy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "toy" / name).write_text(text)
    return tmp_path / "toy"


@pytest.fixture
def run_toy(fresh_python: Run, toy: Path) -> Callable[[str], str]:
    return lambda code: fresh_python(code, path=(toy,), installed=False)


def test_import_of_the_package_imports_neither_torch_nor_lightning(fresh_python: Run) -> None:
    fresh_python("""
import sys
before = set(sys.modules)
import lightning_ssd
dir(lightning_ssd)
outside = {name.partition(".")[0] for name in set(sys.modules) - before} - {"lightning_ssd"}
assert outside <= set(sys.stdlib_module_names), outside
""")


@pytest.mark.parametrize(
    "order",
    [
        "import lightning_ssd, lightning.pytorch",
        "import lightning.pytorch, lightning_ssd",
        "import lightning_ssd, importlib; importlib.import_module('lightning.pytorch')",
        "import lightning_ssd; from lightning.pytorch.strategies import StrategyRegistry",
        "from lightning_ssd._autoload import register; register(); register(); import lightning.pytorch, lightning_ssd",
    ],
)
def test_order_of_imports_does_not_matter(run_toy: Run, order: str) -> None:
    run_toy(f"{order}\nimport lightning.pytorch.strategies as s\nassert list(s.StrategyRegistry) == {NAMES}")


def test_modules_are_as_if_nobody_had_watched(run_toy: Run) -> None:
    run_toy("""
import importlib.util, sys
import lightning_ssd
spec = importlib.util.find_spec("lightning.pytorch.strategies")
import lightning.pytorch.strategies as strategies
for loader in (spec.loader, strategies.__loader__, strategies.__spec__.loader):
    assert type(loader).__module__ == "_frozen_importlib_external", loader
assert strategies.__spec__.loader is strategies.__loader__
""")


def test_leaves_when_done_and_lets_the_finders_behind_be_asked(run_toy: Run) -> None:
    run_toy("""
import sys
import lightning_ssd
asked = []
class Spy:
    def find_spec(self, name, path=None, target=None):
        asked.append(name)
before = list(sys.meta_path)[1:]
sys.meta_path.insert(1, Spy())
import lightning.pytorch, lightning.fabric.strategies, pytorch_lightning, lightning_fabric.strategies
import torch
import after
from lightning_ssd.links import linked
assert torch.serialization.ADMITTED == [linked]
assert sys.meta_path[1:] == before, sys.meta_path
assert "after" in asked  # it was in the search for this module that ours left
""")


def test_reloaded_module_gets_the_name_and_a_removed_name_stays_removed(run_toy: Run) -> None:
    run_toy(f"""
import importlib
import lightning_ssd
import lightning.pytorch.strategies as strategies
strategies.StrategyRegistry.clear()
import after
assert not strategies.StrategyRegistry
importlib.reload(strategies)
importlib.reload(after)
assert list(strategies.StrategyRegistry) == {NAMES}
""")


def test_somebody_elses_strategy_of_that_name_stays(run_toy: Run, toy: Path) -> None:
    with (toy / "lightning/pytorch/strategies/__init__.py").open("a") as file:
        file.write("StrategyRegistry.register('ssd_offload', 'theirs')\n")
    run_toy("""
import lightning_ssd
import lightning.pytorch.strategies as strategies
assert strategies.StrategyRegistry["ssd_offload"] == "theirs"
""")


def test_package_imported_half_way_through_lightning(run_toy: Run, toy: Path) -> None:
    strategies = toy / "lightning/pytorch/strategies/__init__.py"
    strategies.write_text("import lightning_ssd\n" + strategies.read_text())
    run_toy(f"import lightning.pytorch\nassert list(lightning.pytorch.strategies.StrategyRegistry) == {NAMES}")


def test_failed_import_can_be_repeated(run_toy: Run, toy: Path) -> None:
    strategies = toy / "lightning/pytorch/strategies/__init__.py"
    strategies.write_text("import os\nif 'FAIL' in os.environ: raise ImportError('no')\n" + strategies.read_text())
    run_toy(f"""
import os
import lightning_ssd
os.environ["FAIL"] = "1"
try:
    import lightning.pytorch
except ImportError:
    del os.environ["FAIL"]
import lightning.pytorch
assert list(lightning.pytorch.strategies.StrategyRegistry) == {NAMES}
""")


def test_lightning_in_an_archive(fresh_python: Run, toy: Path) -> None:
    with zipfile.ZipFile(toy.parent / "toy.zip", "w") as archive:
        for name, text in TOY.items():
            archive.writestr(name, text)
    code = f"import lightning_ssd, lightning.pytorch as p\nassert list(p.strategies.StrategyRegistry) == {NAMES}"
    fresh_python(code, path=(toy.parent / "toy.zip",), installed=False)


def test_namespace_package_and_lazy_module_are_not_touched(run_toy: Run, toy: Path) -> None:
    (toy / "pytorch_lightning/strategies/__init__.py").unlink()
    run_toy("""
import importlib.util, sys
import lightning_ssd
import pytorch_lightning.strategies
spec = importlib.util.find_spec("lightning_fabric.strategies")
spec.loader = importlib.util.LazyLoader(spec.loader)
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import after
assert type(module).__name__ == "_LazyModule"
assert "ssd_offload" not in module.STRATEGY_REGISTRY  # this loads it
import lightning.pytorch
assert "ssd_offload" in module.STRATEGY_REGISTRY
""")


def test_threads_that_import_at_once(run_toy: Run) -> None:
    # Several threads meet in the finder when a registry has just appeared: many small modules make that likely.
    run_toy(f"""
import sys, threading, warnings
warnings.simplefilter("error")
sys.setswitchinterval(1e-6)
import lightning_ssd
modules = ["lightning.pytorch", "pytorch_lightning", "lightning.fabric.strategies", "lightning_fabric.strategies"]
threads = [threading.Thread(target=__import__, args=[modules[i % 4]]) for i in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
import after
for name in ("lightning.pytorch.strategies", "pytorch_lightning.strategies"):
    assert list(sys.modules[name].StrategyRegistry) == {NAMES}
""")


def test_other_thread_that_comes_first_does_no_harm(run_toy: Run, toy: Path) -> None:
    # What a thread sees that looks just before, and registers just after, another one has registered.
    with (toy / "lightning/pytorch/strategies/__init__.py").open("a") as file:
        file.write("Registry.__contains__ = lambda self, name: bool(self.setdefault(name)) or False\n")
    run_toy("""
import warnings
warnings.simplefilter("error")
import lightning_ssd, lightning.pytorch, after
assert callable(lightning.pytorch.strategies.StrategyRegistry.get("ssd_offload"))
""")


@pytest.mark.parametrize("order", ["lightning_ssd, lightning.pytorch.cli", "lightning.pytorch.cli, lightning_ssd"])
def test_strategy_that_cannot_be_imported_does_not_take_the_cli_along(run_toy: Run, order: str) -> None:
    run_toy(f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import {order}
assert len(caught) == 1, caught
assert "cannot offer SSDOffloadStrategy to lightning.pytorch.cli" in str(caught[0].message)
""")


def test_registry_that_refuses_costs_one_warning(run_toy: Run, toy: Path) -> None:
    strategies = toy / "lightning/pytorch/strategies/__init__.py"
    strategies.write_text("StrategyRegistry = frozenset()\n")
    run_toy("""
import warnings
import lightning_ssd
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lightning.pytorch, after
assert len(caught) == 1, caught
assert "could not register 'ssd_offload' in lightning.pytorch.strategies" in str(caught[0].message)
""")
    run_toy("import warnings; warnings.simplefilter('error'); import lightning_ssd, lightning.pytorch, after")


def test_unknown_attribute_is_an_attribute_error(run_toy: Run) -> None:
    run_toy("import lightning_ssd\nassert not hasattr(lightning_ssd, 'ssdoffloadstrategy')")


# ---------------------------------------------------------------------------------------------- with the real torch


def test_import_torch_registers_and_stays_fast(fresh_python: Run) -> None:
    fresh_python("""
import sys, time
import torch
ours = {name for name in sys.modules if name.startswith("lightning_ssd")}
assert ours == {"lightning_ssd", "lightning_ssd._autoload", "lightning_ssd.links"}, ours
from lightning_ssd._autoload import RegisteringFinder
(finder,) = [f for f in sys.meta_path if isinstance(f, RegisteringFinder)]
started = time.perf_counter()
for _ in range(1000):
    finder.find_spec("something")
assert time.perf_counter() - started < 0.05  # 1000 imports; measured: 0.5 ms
""")


@pytest.mark.parametrize("switch", ["LIGHTNING_SSD_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_switched_off_there_is_no_trace_until_the_package_is_imported(fresh_python: Run, switch: str) -> None:
    code = """
import sys
import torch
assert not [name for name in sys.modules if name.startswith("lightning_ssd")]
finders = list(sys.meta_path)
import lightning_ssd
assert len(sys.meta_path) == len(finders) + 1
"""
    fresh_python(code, **{switch: "0"})


def test_switch_does_not_undo_an_import_that_came_first(fresh_python: Run) -> None:
    code = """
import sys
import lightning_ssd
finders = list(sys.meta_path)
import torch
assert sys.modules["lightning_ssd"] is lightning_ssd
assert all(finder in sys.meta_path for finder in finders)
"""
    fresh_python(code, LIGHTNING_SSD_AUTOLOAD="0")


def test_broken_installation_does_not_break_torch(fresh_python: Run, tmp_path: Path) -> None:
    (tmp_path / "lightning_ssd").mkdir()
    for name in ("__init__.py", "_autoload.py"):  # all else is missing, the native module too
        shutil.copy(REPOSITORY / "lightning_ssd" / name, tmp_path / "lightning_ssd")
    code = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None  # as good as not installed
import torch
assert "lightning_ssd" in sys.modules
"""
    fresh_python(code, package=tmp_path)


# ------------------------------------------------------------------------------------------- with the real Lightning


@pytest.mark.compatibility("Namespaces", "lightning.pytorch")
@pytest.mark.compatibility("Refused", 'Fabric(strategy="ssd_offload"): the Trainer, or another strategy')
def test_lightning(fresh_python: Run) -> None:
    out = fresh_python("""
import sys
import lightning.pytorch as pl
from lightning.fabric import Fabric
from lightning.pytorch.strategies import ParallelStrategy, SingleDeviceStrategy, StrategyRegistry
ours = {name for name in sys.modules if name.startswith("lightning_ssd")}
assert ours == {"lightning_ssd", "lightning_ssd._autoload", "lightning_ssd.links"}, ours
import lightning.pytorch.cli
assert "lightning_ssd.strategy.for_lightning" in sys.modules  # else the CLI does not know its short name
for name in ("ssd_offload", "SSD_Offload", "SSDOffloadStrategy", "lightning_ssd.SSDOffloadStrategy"):
    strategy = pl.Trainer(strategy=name, accelerator="cpu", logger=False, enable_checkpointing=False).strategy
    assert type(strategy).__module__ == "lightning_ssd.strategy.for_lightning"
assert isinstance(strategy, ParallelStrategy)
assert isinstance(strategy, SingleDeviceStrategy)  # else a compiled module is refused
assert "pytorch_lightning" not in sys.modules

import lightning_ssd
from lightning_ssd.errors import ConfigurationError
assert lightning_ssd.SSDOffloadStrategy is type(strategy)
try:
    Fabric(strategy="ssd_offload", accelerator="cpu")
except ConfigurationError as error:
    print(error)
from lightning.fabric.cli import _get_supported_strategies
assert not [name for name in _get_supported_strategies() if "ssd" in name]
assert Fabric(accelerator="cpu", devices=1).strategy is not None

import pytorch_lightning  # with both, `lightning.pytorch` is meant
assert lightning_ssd.SSDOffloadStrategy is type(strategy)
assert "ssd_offload" in pytorch_lightning.strategies.StrategyRegistry
other = pytorch_lightning.strategies.StrategyRegistry.get("ssd_offload")
assert isinstance(other, pytorch_lightning.strategies.ParallelStrategy)
assert isinstance(other, pytorch_lightning.strategies.SingleDeviceStrategy)
assert not isinstance(other, (ParallelStrategy, SingleDeviceStrategy))
""")
    assert "Fabric" in out
    assert "Trainer(strategy='ssd_offload')" in out


@pytest.mark.compatibility("Namespaces", "pytorch_lightning")
@pytest.mark.compatibility("Refused", "the same of lightning_fabric")
def test_pytorch_lightning_alone(fresh_python: Run) -> None:
    out = fresh_python("""
import sys
sys.modules["lightning"] = None  # not installed
import pytorch_lightning as pl
strategy = pl.Trainer(strategy="ssd_offload", accelerator="cpu", logger=False, enable_checkpointing=False).strategy
import lightning_ssd
assert type(strategy) is lightning_ssd.SSDOffloadStrategy
assert type(strategy).__module__ == "lightning_ssd.strategy.for_pytorch_lightning"
assert issubclass(lightning_ssd.SSDOffloadPrecision, pl.plugins.precision.Precision)
from lightning_fabric import Fabric
try:
    Fabric(strategy="ssd_offload", accelerator="cpu")
except lightning_ssd.errors.ConfigurationError as error:
    print(error)
""")
    assert "does not work with Fabric" in out
    assert "Trainer(strategy='ssd_offload')" in out
