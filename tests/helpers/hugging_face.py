"""Small Hugging Face models in folders, and a module that opens one where Lightning wants large models to be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.training import Module


class Causal(Module):
    """The way people wrap these models: labels in, loss out, generation's cache left on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(nn.Identity())
        self._folder: Path | None = folder

    def configure_model(self) -> None:
        from transformers import AutoModelForCausalLM

        if self._folder is not None:
            self.net, self._folder = AutoModelForCausalLM.from_pretrained(self._folder).train(), None
            self.net.config.use_cache = True

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.net(input_ids=batch[0], labels=batch[0]).loss


def make_folder(path: Path, kind: str, seed: int = 0) -> Path:
    """What ``save_pretrained`` writes: ``"gpt2"`` with tied weights and dropout, ``"llama"`` with neither."""
    import transformers

    torch.manual_seed(seed)
    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    else:
        config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=32, n_inner=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path / kind)
    return path / kind
