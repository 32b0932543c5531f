"""Writes a small causal language model with random weights, to try the examples without a download.

    python tiny_model.py FOLDER
    python tiny_model.py FOLDER --width 1024 --depth 12

The folder is as ``save_pretrained`` makes it. The tokenizer has one token per byte, and a chat template.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(folder: Path, model_type: str = "llama", width: int = 256, depth: int = 3, **config: Any) -> None:
    """Write configuration, weights and tokenizer.

    Args:
        folder: Made if it is missing.
        model_type: Name of a decoder that transformers knows, such as ``"llama"`` or ``"gemma2"``.
        width: Hidden size.
        depth: Number of layers.
        config: More of the model's configuration.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special)
    wrapped.save_pretrained(folder)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4}
    tokens = {"vocab_size": len(alphabet), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    made = AutoConfig.for_model(model_type, **{**sizes, **heads, **tokens, **config})
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3)
    arguments = parser.parse_args()
    write_model(arguments.folder, width=arguments.width, depth=arguments.depth)
    print(f"{arguments.folder}: random weights, {arguments.depth} layers of width {arguments.width}")
