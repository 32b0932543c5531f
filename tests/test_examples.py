"""The examples run as a user runs them: as programs, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "the quick brown fox jumps over the lazy dog while seven wizards quietly brew a stranger potion\n" * 400
STRATEGY = "ssd_offload"
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "gemma2": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 5.0},
    "granite": {"num_attention_heads": 2, "num_key_value_heads": 1, "logits_scaling": 4.0},
}


def run(script: str, *args: object, cwd: Path | None = None) -> str:
    """Output of an example; fails the test with its errors."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / script), *map(str, args)]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def write_model(folder: Path, model_type: str) -> None:
    """A random tiny model with a word tokenizer, as ``save_pretrained`` writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<bos>", "<unk>", *sorted(set(TEXT.split()))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")
    wrapped.save_pretrained(folder)
    # Matrices of 512 KiB and more: smaller parameters stay where they were made and would not show a lost weight.
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        **CONFIGS[model_type],
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def figures(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["figures"] for line in path.read_text().splitlines()]


def setting(tmp_path: Path, model_type: str) -> tuple[object, ...]:
    """Writes model and text; the arguments that all runs share."""
    write_model(tmp_path / "model", model_type)
    (tmp_path / "text.txt").write_text(TEXT)
    return (
        *("--model", tmp_path / "model", "--text", tmp_path / "text.txt", "--batch-size", 4, "--seq-len", 16),
        *("--lr", 1e-2, "--eval-batches", 2, "--accelerator", "cpu", "--strategy", STRATEGY, "--out", tmp_path / "out"),
    )


def test_finetune_then_resume_is_finetune(tmp_path: Path) -> None:
    """Four steps, a checkpoint, four more in a new process: the losses of eight steps in one go."""
    common = (*setting(tmp_path, "gemma2"), "--accumulate", 2, "--clip", 1.0, "--loss-slice", 24)
    parts, whole = tmp_path / "parts.json", tmp_path / "whole.json"

    table = run("finetune_lm.py", *common, "--steps", 4, "--json", parts)
    run("finetune_lm.py", *common, "--steps", 8, "--json", parts, "--resume", tmp_path / "out" / "step-4.ckpt")
    run("finetune_lm.py", *common, "--steps", 8, "--json", whole, "--out", tmp_path / "whole")

    first, second = figures(parts)
    (uninterrupted,) = figures(whole)
    assert len(first["losses"]) == 4
    assert second["losses"] == uninterrupted["losses"]
    assert [step for step, _ in second["held_out"]] == [0, 4, 8]
    assert second["held_out"][-1] == uninterrupted["held_out"][-1]
    assert sum(first["held_out"][-1][1]) < sum(first["held_out"][0][1])
    for row in ("held-out loss after 4 steps", "tokens/s", "peak anonymous memory", "read / written per step"):
        assert row in table


def test_starts_from_the_weights_of_the_folder(tmp_path: Path) -> None:
    """Held-out loss before the first step equals plain Lightning's: no weight was lost or initialised again."""
    common = setting(tmp_path, "llama")
    run("finetune_lm.py", *common, "--strategy", "auto", "--steps", 4, "--json", tmp_path / "runs.json")
    streams = ("--strategy", "ssd_offload", "--host-memory", "min")
    run("finetune_lm.py", *common, *streams, "--steps", 4, "--json", tmp_path / "runs.json")
    plain, streamed = figures(tmp_path / "runs.json")
    (_, before), (_, after) = streamed["held_out"]
    assert before == plain["held_out"][0][1]
    assert sum(after) < sum(before)
    assert plain["io"] is None
    assert streamed["io"]["written_nbytes"] > 0


def test_an_unknown_treatment_of_logits_is_refused(tmp_path: Path) -> None:
    """Granite divides its logits by a number of its config: a loss without that would be silently wrong."""
    common = setting(tmp_path, "granite")
    with pytest.raises(AssertionError, match="treats its logits in a way"):
        run("finetune_lm.py", *common, "--steps", 1)


def test_minimal_example_trains(tmp_path: Path) -> None:
    run("minimal.py", cwd=tmp_path)


def test_cli_prints_and_accepts_the_strategy_by_name_and_by_class(tmp_path: Path) -> None:
    by_name = run("cli.py", "fit", "--trainer.strategy", "ssd_offload", "--print_config", cwd=tmp_path)
    assert "ssd_offload" in by_name
    by_class = run("cli.py", "fit", "--config", EXAMPLES / "configs" / "cli.yaml", "--print_config", cwd=tmp_path)
    assert "host_memory: 4GiB" in by_class
    run("cli.py", "fit", "--config", EXAMPLES / "configs" / "cli.yaml", cwd=tmp_path)
