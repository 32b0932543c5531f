"""Every spelling that `LightningCLI` and its configuration files have for the strategy, in both namespaces.

Importing Lightning takes seconds, so one interpreter per namespace works through all cases and reports them as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., str]

CASES: dict[str, list[str]] = {
    "name": ["--trainer.strategy=ssd_offload"],
    "short": ["--trainer.strategy=SSDOffloadStrategy"],
    "short lower": ["--trainer.strategy=ssdoffloadstrategy"],
    "path": ["--trainer.strategy=lightning_ssd.SSDOffloadStrategy"],
    "path lower": ["--trainer.strategy=lightning_ssd.ssdoffloadstrategy"],
    "name in a file": ["--config={dir}/name.yaml"],
    "short with options": [
        "--trainer.strategy=SSDOffloadStrategy",
        "--trainer.strategy.host_memory=8GiB",
        "--trainer.strategy.nvme_path=[/a,/b]",
        "--trainer.strategy.window=4",
        "--trainer.strategy.verify_reads=false",
        "--trainer.strategy.io.depth=3",
    ],
    "path with options": [
        "--trainer.strategy=lightning_ssd.SSDOffloadStrategy",
        "--trainer.strategy.host_memory=1024",
        "--trainer.strategy.nvme_path=/a",
        "--trainer.strategy.units=[Block,Head]",
        "--trainer.strategy.io={engine: python, block_nbytes: 8192}",
    ],
    "file": ["--config={dir}/options.yaml"],
    "file then option": ["--config={dir}/options.yaml", "--trainer.strategy.io.depth=5"],
    "bad choice": ["--trainer.strategy=SSDOffloadStrategy", "--trainer.strategy.overlap=perhaps"],
    "bad option": ["--trainer.strategy=SSDOffloadStrategy", "--trainer.strategy.io.color=red"],
    "printed": [
        "--trainer.strategy=SSDOffloadStrategy",
        "--trainer.strategy.host_memory=8GiB",
        "--trainer.strategy.io.engine=posix",
        "--print_config",
    ],
    "printed, read again": ["--config={dir}/printed.yaml"],
    "environment": [],
}
FILES = {
    "name.yaml": "trainer:\n  strategy: ssd_offload\n",
    "options.yaml": """
trainer:
  strategy:
    class_path: SSDOffloadStrategy
    init_args:
      nvme_path: [/a]
      host_memory: 8GiB
      io: {engine: python, direct: "off"}
""",
}
DRIVER = """
import contextlib, dataclasses, functools, importlib, io, json, os, sys, warnings
warnings.simplefilter("ignore")
namespace, directory, cases = json.loads(os.environ["CASES"])
cli = importlib.import_module(namespace + ".cli")
boring = importlib.import_module(namespace + ".demos.boring_classes")

class CLI(cli.LightningCLI):
    def before_instantiate_classes(self):  # parsing is over: nobody looks at the signature any more
        from lightning_ssd.strategy.strategy import StrategyMixin

        @functools.wraps(original := StrategyMixin.__init__)
        def record(strategy, *args, **kwargs):
            self.passed = kwargs
            original(strategy, *args, **kwargs)

        StrategyMixin.__init__ = record
        self.undo = lambda: setattr(StrategyMixin, "__init__", original)

def plain(value):
    return [type(value).__name__, dataclasses.asdict(value)] if dataclasses.is_dataclass(value) else value

def run(args, **parser_kwargs):
    out = io.StringIO()
    defaults = dict(accelerator="cpu", logger=False, enable_checkpointing=False)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            made = CLI(boring.BoringModel, run=False, args=args, parser_kwargs=parser_kwargs, trainer_defaults=defaults)
    except SystemExit as error:
        return {"exit": error.code, "out": out.getvalue()}
    except Exception as error:
        return {"error": repr(error)}
    made.undo()
    made_class = type(made.trainer.strategy)
    passed = {name: plain(value) for name, value in made.passed.items()}
    return {"class": made_class.__module__ + "." + made_class.__name__, "passed": passed}

results = {}
for name, args in cases.items():
    if name == "environment":
        spec = {"class_path": "lightning_ssd.SSDOffloadStrategy", "init_args": {"host_memory": "2GiB"}}
        os.environ["PL_TRAINER__STRATEGY"] = json.dumps(spec)
    results[name] = run([arg.replace("{dir}", directory) for arg in args], default_env=name == "environment")
    if name == "printed":
        with open(directory + "/printed.yaml", "w") as file:
            file.write(results[name]["out"])
results["lightnings"] = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def results(request: pytest.FixtureRequest, fresh_python: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What became of each case, by name; the namespace is under ``"namespace"``."""
    directory = tmp_path_factory.mktemp("cli")
    for name, text in FILES.items():
        (directory / name).write_text(text)
    out = fresh_python(DRIVER, CASES=json.dumps([request.param, str(directory), CASES]))
    return {"namespace": request.param} | json.loads(out.partition("RESULTS")[2])


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("bad") and case != "printed"])
def test_every_spelling_makes_the_strategy_of_the_namespace(results: Any, case: str) -> None:
    module = {"lightning.pytorch": "for_lightning", "pytorch_lightning": "for_pytorch_lightning"}[results["namespace"]]
    assert results[case].get("class") == f"lightning_ssd.strategy.{module}.SSDOffloadStrategy", results[case]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (
            "short with options",
            {"host_memory": "8GiB", "nvme_path": ["/a", "/b"], "window": 4, "verify_reads": False, "io": {"depth": 3}},
        ),
        (
            "path with options",
            {
                "host_memory": 1024,
                "nvme_path": "/a",
                "units": ["Block", "Head"],
                "io": {"engine": "python", "block_nbytes": 8192},
            },
        ),
        ("file", {"host_memory": "8GiB", "nvme_path": ["/a"], "io": {"engine": "python", "direct": "off"}}),
        ("file then option", {"host_memory": "8GiB", "io": {"engine": "python", "direct": "off", "depth": 5}}),
        ("printed, read again", {"host_memory": "8GiB", "nvme_path": None, "io": {"engine": "posix"}}),
        ("environment", {"host_memory": "2GiB"}),
    ],
)
def test_options_arrive(results: Any, case: str, expected: dict[str, Any]) -> None:
    passed = results[case]["passed"]
    type_name, io = passed["io"]
    assert type_name == "IOOptions"
    for name, value in expected.items():
        assert (passed[name] if name != "io" else {key: io[key] for key in value}) == value


def test_other_namespace_is_not_imported(results: Any) -> None:
    # jsonargparse runs the `if TYPE_CHECKING:` blocks of a module whose signatures it reads. One that imports the
    # other Lightning would take seconds, and turn `lightning_ssd.SSDOffloadStrategy` into the other class meanwhile.
    assert results["lightnings"] == [results["namespace"]]


def test_name_passes_no_options(results: Any) -> None:
    assert results["name"]["passed"] == {}


@pytest.mark.parametrize(("case", "named"), [("bad choice", "perhaps"), ("bad option", "color")])
def test_what_cannot_be_is_refused_by_the_parser(results: Any, case: str, named: str) -> None:
    assert results[case]["exit"] == 2
    assert named in results[case]["out"]


def test_printed_configuration_names_the_public_class_and_every_option(results: Any) -> None:
    printed = results["printed"]["out"]
    assert results["printed"]["exit"] == 0
    assert "class_path: lightning_ssd.SSDOffloadStrategy" in printed
    for line in ("host_memory: 8GiB", "nvme_path: null", "window: auto", "engine: posix", "block_nbytes: 4MiB"):
        assert line in printed
