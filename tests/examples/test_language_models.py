"""The examples of language models: fine-tuning on text and on conversations, adapters, generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.example_programs import import_example, run_example

lm_data = import_example("lm_data")
tiny_model = import_example("tiny_model")

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards quietly brew a stranger potion\n" * 400
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Also two, \u00fcberall."},
    {"role": "user", "content": "Thanks."},
]
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "gemma2": {"final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 4.0},
}


@pytest.fixture(autouse=True)
def _no_threads_of_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would outlive a test that encodes texts."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def write_model(folder: Path, model_type: str, **config: Any) -> None:
    """Matrices of 512 KiB and more: smaller parameters stay where they were made and would not show a lost weight."""
    tiny_model.write_model(folder, model_type, **CONFIGS[model_type], **config)


def figures(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["figures"] for line in path.read_text().splitlines()]


def setting(tmp_path: Path, model_type: str) -> tuple[object, ...]:
    """Writes model and text; the arguments that all runs share."""
    write_model(tmp_path / "model", model_type)
    (tmp_path / "text.txt").write_text(TEXT)
    return (
        *("--model", tmp_path / "model", "--text", tmp_path / "text.txt", "--batch-size", 4, "--seq-len", 32),
        *("--lr", 1e-2, "--eval-batches", 2, "--accelerator", "cpu", "--out", tmp_path / "out"),
    )


def test_finetune_then_resume_is_finetune(tmp_path: Path) -> None:
    """Four steps, a checkpoint, four more in a new process: the losses of eight steps in one go."""
    common = (*setting(tmp_path, "gemma2"), "--accumulate", 2, "--clip", 1.0, "--loss-slice", 48)
    parts, whole = tmp_path / "parts.json", tmp_path / "whole.json"

    table = run_example("finetune_lm.py", *common, "--steps", 4, "--json", parts)
    resume = ("--resume", tmp_path / "out" / "step-4.ckpt")
    run_example("finetune_lm.py", *common, "--steps", 8, "--json", parts, *resume)
    run_example("finetune_lm.py", *common, "--steps", 8, "--json", whole, "--out", tmp_path / "whole")

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
    common = (*setting(tmp_path, "llama"), "--steps", 4, "--json", tmp_path / "runs.json")
    run_example("finetune_lm.py", *common, "--strategy", "auto")
    run_example("finetune_lm.py", *common, "--host-memory", "min")
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
        run_example("finetune_lm.py", *common, "--steps", 1)


# ------------------------------------------------------------------------------------------------------ conversations


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    write_model(tmp_path / "model", "llama", width=16, depth=1)
    return AutoTokenizer.from_pretrained(tmp_path / "model")


def test_only_what_the_assistant_says_is_trained_on(tokenizer: Any) -> None:
    talk = lm_data.apply_chat_template(tokenizer, TALK)
    assert tokenizer.decode(talk.tokens[talk.is_answer]) == "Two.<eos>Also two, \u00fcberall.<eos>"
    read = "<|system|>Be brief.<eos><|user|>How many?<eos><|assistant|><|user|>And now?<eos><|assistant|>"
    assert tokenizer.decode(talk.tokens[~talk.is_answer]) == read  # nobody answered the last turn


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(SystemExit, match="changes what is before turn 3"):
        lm_data.apply_chat_template(tokenizer, TALK)


def test_conversations_are_cut_padded_or_left_out(tokenizer: Any) -> None:
    talk = lm_data.apply_chat_template(tokenizer, TALK)
    first = int(talk.is_answer.argmax())
    ignored = lm_data.IGNORED

    tokens, labels = lm_data.Conversations([talk], len(talk.tokens) + 9, padding=1)[0]
    assert tokens.tolist() == [*talk.tokens, *[1] * 10]
    assert labels.ne(ignored).tolist() == [*talk.is_answer, *[False] * 10]
    assert (tokens[labels != ignored] == labels[labels != ignored]).all()

    tokens, labels = lm_data.Conversations([talk], first, padding=1)[0]
    assert tokens.tolist() == talk.tokens[: first + 1].tolist()
    assert labels.tolist() == [*[ignored] * first, talk.tokens[first]]
    with pytest.raises(SystemExit, match=f"no answer begins within {first - 1} tokens"):
        lm_data.Conversations([talk], first - 1, padding=1)


def test_the_loss_is_that_of_the_model_over_the_answers(tmp_path: Path, tokenizer: Any) -> None:
    finetune_lm = import_example("finetune_lm")
    talks = [lm_data.apply_chat_template(tokenizer, TALK[: 3 + 2 * more]) for more in (0, 1)]
    samples = [lm_data.Conversations(talks, 120, padding=1)[index] for index in (0, 1)]
    batch = lm_data.Sample(*(torch.stack(parts) for parts in zip(*samples, strict=True)))
    module = finetune_lm.CausalLM(tmp_path / "model", None, 1, 1, 0.1, loss_slice=50)
    module.configure_model()
    with torch.no_grad():
        losses = module.token_losses(batch)
        expected = module.model(input_ids=batch.tokens, labels=batch.labels).loss
    assert (losses[batch.labels[:, 1:] == lm_data.IGNORED] == 0).all()
    torch.testing.assert_close(losses.sum() / finetune_lm.num_trained(batch).sum(), expected)


def test_conversations_are_learned(tmp_path: Path) -> None:
    common = setting(tmp_path, "llama")
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(40)))
    chat = ("--text", tmp_path / "talks.jsonl", "--seq-len", 150, "--json", tmp_path / "runs.json")
    run_example("finetune_lm.py", *common, *chat, "--steps", 6)
    (run,) = figures(tmp_path / "runs.json")
    (_, before), (_, after) = run["held_out"]
    assert len(before) == 2  # a twentieth
    assert sum(after) < 0.8 * sum(before)


# ----------------------------------------------------------------------------------------------- adapters, generation


def test_adapters_are_trained_over_a_base_that_is_never_written(tmp_path: Path) -> None:
    common = (*setting(tmp_path, "llama"), "--rank", 4, "--host-memory", "min", "--json", tmp_path / "runs.json")
    run_example("lora.py", *common, "--steps", 3)
    run_example("lora.py", *common, "--steps", 5, "--resume", tmp_path / "out" / "step-3.ckpt")
    run_example("lora.py", *common, "--steps", 5, "--out", tmp_path / "whole")
    first, resumed, whole = figures(tmp_path / "runs.json")
    assert resumed["losses"] == whole["losses"]

    trained, base = first["num_trained_params"], first["num_params"] - first["num_trained_params"]
    state = 12 * trained  # parameter and two moments, of four bytes
    assert 0 < first["io"]["written_nbytes"] < 2 * state < 4 * base
    assert first["io"]["read_nbytes"] > 4 * base  # in forward and in backward, less what is held in memory

    saved = torch.load(tmp_path / "out" / "step-5.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all("lora_" in name for name in saved)
    assert (tmp_path / "out" / "step-5.ckpt").stat().st_size < 2 * base

    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out" / "adapter"
    ).state_dict()
    assert {name.replace(".default", "") for name in loaded if "lora_" in name} == set(adapter)
    assert all(torch.equal(saved[f"model.{name}"], loaded[name]) for name in loaded if "lora_" in name)


def test_generates_in_less_memory_than_the_weights_take(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", width=768, depth=8)
    prompts = ["Once upon a time", "In the"]
    options = ("--tokens", 4, "--host-memory", "64MiB", "--accelerator", "cpu", "--json", tmp_path / "run.json")
    model = ("--model", tmp_path / "model", "--nvme-path", tmp_path)
    run_example("generate.py", *model, *options, *(part for text in prompts for part in ("--prompt", text)))
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["weights"] > 2.4 * 2**26  # the budget
    assert run["anonymous"] < 0.75 * run["weights"]
    assert run["read"] > 2 * run["weights"]  # at each token again, less what is held in memory

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", padding_side="left")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    tokens = plain.generate(**batch, do_sample=False, min_new_tokens=4, max_new_tokens=4)
    assert run["texts"] == [tokenizer.decode(row[batch["input_ids"].shape[1] :]) for row in tokens]
