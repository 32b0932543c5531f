"""What is published: a wheel that holds the package alone, needs what it imports, and has a page without dead links."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

from tests.test_layering import imports_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_ssd"
# The same classes under another name, for whoever has only that: not a dependency.
OTHER_NAME = {"pytorch_lightning": "lightning"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Without the native module: what is in it besides is the same, in a second."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder), f"--config-settings=build-dir={folder}/build", str(ROOT)]
    subprocess.run(command, check=True, env=os.environ | {"LIGHTNING_SSD_NO_NATIVE": "true"})
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def pyproject() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    found: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def named(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].replace("-", "_")


def test_what_is_required_is_what_is_imported() -> None:
    roots = {name.partition(".")[0] for file in PACKAGE.rglob("*.py") for name in imports_of(file)}
    others = {OTHER_NAME.get(root, root) for root in roots - {"lightning_ssd", "__future__", *sys.stdlib_module_names}}
    assert others == set(map(named, pyproject()["dependencies"]))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    tracked = {str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*") if p.suffix in (".py", ".typed")}
    assert names - {"lightning_ssd/_native.pyi"} == tracked
    assert "lightning_ssd/py.typed" in names


def test_the_source_distribution_holds_what_the_page_names(tmp_path: Path) -> None:
    """Documents, examples and tests too, and nothing that was built."""
    build = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "README.md",
        "LICENSE",
        "PKG-INFO",
        "docs/README.md",
        "examples/README.md",
        "tests/test_packaging.py",
    } <= names
    assert {"docs/results/memory_and_speed.svg", "native/CMakeLists.txt", "lightning_ssd/py.typed"} <= names
    assert not [
        name for name in names if name.endswith((".so", ".pyc")) or name.startswith((".venv", "build", ".demo"))
    ]


def test_what_is_installed_fits_together() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_module_of_the_package_is_used_by_it() -> None:
    """What only tests import belongs to the tests."""
    imported = {name for file in PACKAGE.rglob("*.py") for name in imports_of(file)}
    imported |= {".".join(name.split(".")[:-1]) for name in imported}
    text = "".join(file.read_text() for file in PACKAGE.rglob("*.py")) + (ROOT / "pyproject.toml").read_text()
    for file in PACKAGE.rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert module in imported or module in text, f"{module} is imported by nobody"


def test_the_metadata_says_what_somebody_needs_to_know(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert not any(line.startswith("License ::") for line in metadata.get_all("Classifier", []))  # PEP 639
    extras = {extra: [] for extra in metadata.get_all("Provides-Extra", [])}
    for requirement in metadata.get_all("Requires-Dist", []):
        found = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if found:
            extras[found[1]].append(named(requirement))
    assert extras["dali"] == ["nvidia_dali_cuda130"]
    assert (extras["cli"], extras["metrics"]) == (["jsonargparse"], ["torchmetrics"])
    assert {"transformers", "peft", "pillow"} <= set(extras["examples"])
    assert {"pytest", "lightning_ssd"} <= set(extras["test"])


def test_the_page_has_no_link_that_is_dead_elsewhere(metadata: Message) -> None:
    page = metadata.get_payload()
    assert isinstance(page, str)
    assert page.strip() == (ROOT / "README.md").read_text().strip()
    # The picture lies in the source tree alone: where it is not, its description says what it shows.
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", page)
    assert links
    assert all(link.startswith("https://") for link in links), links
    for path in re.findall(r"`((?:docs|examples|tests)/[\w./]*|[A-Z]+\.md|LICENSE)`", page):
        assert (ROOT / path).exists(), path
