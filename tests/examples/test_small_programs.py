"""The examples that need no language model of others: the one changed line, a GPT from scratch, LightningCLI."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.example_programs import EXAMPLES, run_example
from tests.soak.fresh_examples import PAGES, ROOT, commands_of


def test_minimal_example_trains(tmp_path: Path) -> None:
    run_example("minimal.py", cwd=tmp_path)


def test_a_gpt_learns_from_scratch_and_writes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh" * 4000)
    options = ("--text", tmp_path / "text.txt", "--host-memory", "min", "--width", 64, "--depth", 2, "--context", 32)
    more = ("--batch-size", 8, "--lr", 3e-3, "--steps", 60, "--prompt", "abcd", "--accelerator", "cpu")
    output = run_example("gpt.py", *options, *more, cwd=tmp_path)
    loss = re.search(r"loss ([\d.]+) after 60 steps", output)
    assert loss
    assert float(loss[1]) < 0.5  # ln 256 = 5.5 before
    assert "abcdefgh" * 4 in output
    assert (tmp_path / "out" / "step-60.ckpt").is_file()


def test_cli_prints_and_accepts_the_strategy_by_name_and_by_class(tmp_path: Path) -> None:
    by_name = run_example("cli.py", "fit", "--trainer.strategy", "ssd_offload", "--print_config", cwd=tmp_path)
    assert "ssd_offload" in by_name
    config = ("--config", EXAMPLES / "configs" / "gpt.yaml")
    by_class = run_example("cli.py", "fit", *config, "--print_config", cwd=tmp_path)
    assert "host_memory: 256MiB" in by_class
    run_example("cli.py", "fit", *config, "--model.width", 32, "--trainer.max_steps", 2, cwd=tmp_path)


def test_the_pages_name_programs_that_exist() -> None:
    """`make examples` runs them all in a fresh environment, which takes minutes."""
    commands = [(ROOT / page, command) for page in PAGES for command in commands_of(ROOT / page)]
    programs = [(page, command.split()[1]) for page, command in commands if command.startswith("python ")]
    assert len(programs) > 10
    for page, program in programs:
        assert (page.parent / program).is_file(), f"{page} runs {program}"
    listed = set(re.findall(r"^\| `(\w+\.py)`", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    helpers = {"lm_data.py", "report.py", "prepare_demo.py", "tiny_model.py"}
    assert listed == {path.name for path in EXAMPLES.glob("*.py")} - helpers
