"""What the documents say is so: snippets run, names exist, links lead somewhere, the options are those of the code."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lightning_ssd.checkpoint import manifest_json
from lightning_ssd.convert import importing
from lightning_ssd.optim.rules import NATIVE_RULES
from lightning_ssd.saving import write
from lightning_ssd.session import session
from lightning_ssd.session.settings import Options, argument_docs
from lightning_ssd.units import unit
from tests.benchmarks import picture
from tests.helpers import api_page, compatibility_page
from tests.helpers.docs import DOCS, code_blocks, message_patterns, quoted_messages, runnable_blocks

# Used by name, not by argument: sessions end with the test, and small models train on one thread.
from tests.helpers.fixtures import _sessions_end  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_ssd"
DESIGN = {page.name: page.read_text() for page in sorted((DOCS / "design").glob("*.md"))}

# What the page about extending replaces, to extend the package from outside.
CHANGED = [
    (session, "make_engine"),
    (unit, "float32"),
    (write, "float32"),
    (manifest_json, "CODECS"),
    (importing, "open_source"),
]

REFERENCE = re.compile(r"`([\w./]+\.(?:py|cpp|hpp|pyi))(?:::([\w.]+))?`")
CALLS = re.compile(r"^```calls\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"^( *)([\w.]+) +([\w/]+\.py)(?=\s|$)", re.MULTILINE)
NOTE = re.compile(r"^ *\[Note: ([^\]]+)\] \S", re.MULTILINE)
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
RUNNABLE = [str(page.relative_to(DOCS)) for page in PAGES if "```python run\n" in page.read_text()]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)")


def has_name(tree: ast.AST, name: str) -> bool:
    """Whether a module defines ``name``, which may be ``Class.method``."""
    head, _, rest = name.partition(".")
    for node in ast.iter_child_nodes(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}
        if head in names and (not rest or has_name(node, rest)):
            return True
    return False


@pytest.mark.parametrize("page", RUNNABLE)
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, as somebody would who reads the page from the top."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_SSD_PATH", raising=False)
    for changed, name in CHANGED:
        monkeypatch.setattr(changed, name, getattr(changed, name))  # restored afterwards
    registry = dict(NATIVE_RULES)
    blocks = list(runnable_blocks(page))
    namespace: dict[str, object] = {"__name__": page}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning has advice on every small run
            for line, code in blocks:
                exec(compile("\n" * (line - 1) + code, str(DOCS / page), "exec"), namespace)
    finally:
        NATIVE_RULES.clear()
        NATIVE_RULES.update(registry)


def test_the_pages_for_people_run() -> None:
    assert {"quickstart.md", "guide.md", "memory-and-tuning.md", "design/extending.md"} <= set(RUNNABLE)


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_SSD_PATH", raising=False)
    ((_, code),) = code_blocks(ROOT / "README.md", "python")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "README.md", "exec"), {"__name__": "README.md"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_other_code_is_well_formed(page: Path) -> None:
    """What is not run: Python compiles, and shells, YAML and JSON readers take the rest."""
    for line, code in code_blocks(page, "python"):
        compile("\n" * (line - 1) + code, str(page), "exec")
    for _, code in code_blocks(page, "yaml"):
        assert yaml.safe_load(code)
    for _, code in code_blocks(page, "json"):
        assert json.loads(code)
    for line, code in code_blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True, check=False)
        assert not done.stderr, f"{page.name}:{line}: {done.stderr}"


@pytest.mark.parametrize(
    ("file", "name"), sorted({found for text in DESIGN.values() for found in REFERENCE.findall(text)})
)
def test_names_in_the_design_exist(file: str, name: str) -> None:
    """A bare file name, such as `plan.py` in a row about its package, may lie in any folder."""
    path = next((p for p in (PACKAGE / file, ROOT / file) if p.is_file()), None)
    if path is None and "/" not in file:
        path = next(iter(PACKAGE.rglob(file)), None)
    assert path is not None, f"{file} does not exist"
    assert not name or has_name(ast.parse(path.read_text()), name), f"{file} has no {name}"


def calls_of(text: str) -> Iterator[tuple[str, str, str]]:
    """Caller, its file, and what it calls, from the blocks of calls; the caller of a first line is empty."""
    for block in CALLS.findall(text):
        above: list[tuple[int, str, str]] = []
        for indent, name, file in CALL.findall(block):
            while above and above[-1][0] >= len(indent):
                above.pop()
            yield (*(above[-1][1:] if above else ("", "")), name)
            above.append((len(indent), name, file))


def source_of(file: str, name: str) -> str:
    """Source of a function or class, which may be ``Class.method``."""
    text = (PACKAGE / file).read_text()
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        node = next(n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == part)
    return ast.get_source_segment(text, node) or ""


def test_calls_in_the_architecture_are_made() -> None:
    """Each indented line is named in the source of the one that calls it, and every line's name exists in its file."""
    page = DESIGN["architecture.md"]
    calls = list(calls_of(page))
    assert len(calls) > 50
    for block in CALLS.findall(page):
        assert len(CALL.findall(block)) == block.count("\n"), block
        for _, name, file in CALL.findall(block):
            assert has_name(ast.parse((PACKAGE / file).read_text()), name), f"{file} has no {name}"
    for caller, file, callee in calls:
        called = callee.rpartition(".")[2]
        assert not caller or re.search(rf"\b{called}\b", source_of(file, caller)), f"{caller} does not call {callee}"


def test_notes_that_the_design_cites_are_written() -> None:
    """A note is a paragraph that begins with its name; where it is cited, the name stands inside a sentence."""
    written = {note for path in PACKAGE.rglob("*.py") for note in NOTE.findall(path.read_text())}
    cited = {" ".join(note.split()) for text in DESIGN.values() for note in re.findall(r"\[Note: ([^\].]+)\]", text)}
    assert len(cited) > 20
    assert cited <= written, f"nowhere in the package: {cited - written}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def option_rows() -> list[str]:
    """The README's table of options, from `Options`."""
    entries = re.findall(r"^ *(\w+): (\S.*(?:\n(?! *\w+: ).*)*)", argument_docs(), re.MULTILINE)
    documented = {name: " ".join(text.split()).replace("``", "`") for name, text in entries}
    rows = []
    for field in fields(Options):
        default = {"min_unit_numel": "1_000_000", "io": "IOOptions()"}.get(field.name) or repr(field.default)
        rows.append(f"| `{field.name}` | `{default.replace(chr(39), chr(34))}` | {documented[field.name]} |")
    return rows


def test_the_table_of_options_is_that_of_the_code() -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| `\w+` \| `", line)]
    expected = option_rows()
    assert rows == expected, "the README's table must be:\n" + "\n".join(expected)


def test_quoted_messages_are_those_of_the_code() -> None:
    """Names and numbers are those of some run, the words those of a string in the package."""
    patterns = message_patterns(PACKAGE)
    quoted = quoted_messages("troubleshooting.md")
    assert len(quoted) > 15
    for kind, text in quoted:
        # An IOFailure is put together of what the system says; the log indents what follows its first line.
        is_found = kind == "IOFailure" or any(p.fullmatch(text) or p.fullmatch(f"  {text}") for p in patterns)
        assert is_found, f"no message of the package reads: {text}"


def test_the_api_reference_is_made_from_the_docstrings() -> None:
    is_same = (DOCS / "api.md").read_text() == api_page.page()
    assert is_same, "docs/api.md is stale: run `python -m tests.helpers.api_page`"


def test_the_table_of_compatibility_is_made_from_the_tests() -> None:
    is_same = (DOCS / "compatibility.md").read_text() == compatibility_page.page()
    assert is_same, "docs/compatibility.md is stale: run `python -m tests.helpers.compatibility_page`"


def test_the_figures_of_choosing_are_measured() -> None:
    """What a reader decides by is what the lines in `docs/results` say."""
    text = " ".join((DOCS / "choosing.md").read_text().split())
    peers = {line["model"]: line for line in picture.lines_of("peers.jsonl") if line["cpu"] == "AMD EPYC"}
    demo = picture.lines_of("demo.jsonl")[0]["figures"]["io"]
    step, plain = peers["350m"]["step_s"], peers["350m"]["in_memory_step_s"]
    times = [min(v for k, v in p["speedup"]["same_memory"].items()) for p in peers.values()]
    for said in (
        f"in 512 MiB a step takes {step['small']:.2f} s, and {plain:.2f} s in plain PyTorch",
        f"In {peers['350m']['peak_rss_mb']['same_memory'] / 1000:.1f} GB it takes {step['same_memory']:.2f} s",
        f"reads {demo['read_nbytes'] / 1e9:.2f} GB and writes {demo['written_nbytes'] / 1e9:.2f} GB",
        f"1,000 steps write {demo['written_nbytes'] / 1e9:.2f} TB",
        f"a step was {min(times):.1f} to {max(times):.1f} times as fast",
    ):
        assert said in text, said


def test_the_picture_shows_what_was_measured() -> None:
    shown = picture.PICTURE.read_text()
    assert all(f">{label}<" in shown for label in picture.labels()), "run `python -m tests.benchmarks.picture`"
    (description,) = re.findall(r"!\[([^\]]+)\]", (ROOT / "README.md").read_text())
    numbers = re.findall(r"\d+\.\d\d", description)
    assert len(numbers) > 10
    assert set(numbers) <= set(picture.labels())
