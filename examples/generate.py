"""Generates text with a model that is larger than memory: for each token all weights stream from the SSD once.

    python generate.py --model DIR --prompt "Once upon a time" --prompt "In the beginning" --tokens 20

DIR is what ``save_pretrained`` writes. The prompts of a batch share the reads: many cost little more than one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from report import GB, MemorySampler, memory_now, print_table
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ssd import SSDOffloadStrategy


class Generator(LightningModule):
    """A language model that only predicts.

    Args:
        model_dir: Folder written by ``save_pretrained``.
        num_tokens: To be generated for each prompt.
    """

    def __init__(self, model_dir: Path, num_tokens: int) -> None:
        super().__init__()
        self.model: Any = None
        self.model_dir = model_dir
        self.num_tokens = num_tokens

    @override
    def configure_model(self) -> None:
        # Here and not in __init__: the strategy then puts each weight on the disk as it is read, and not in memory.
        if self.model is None:
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(self.model_dir, local_files_only=True)

    @override
    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        # The cache of keys and values, in memory, spares the pass over earlier tokens; weights are read for each token.
        tokens: torch.Tensor = self.model.generate(
            **batch, do_sample=False, min_new_tokens=self.num_tokens, max_new_tokens=self.num_tokens
        )
        return tokens[:, batch["input_ids"].shape[1] :]  # [prompts, num_tokens]


def main() -> None:
    """Generate, say what it cost."""
    args = parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompts = DataLoader(args.prompt, batch_size=args.batch_size, collate_fn=lambda texts: _encode(tokenizer, texts))
    strategy = SSDOffloadStrategy(nvme_path=args.nvme_path, host_memory=args.host_memory)
    module = Generator(args.model, args.tokens)
    trainer = Trainer(strategy=strategy, accelerator=args.accelerator, devices=1, logger=False)
    at_start = memory_now().anonymous_nbytes
    sampler = MemorySampler()
    sampler.start()
    batches: Any = trainer.predict(module, prompts)
    peak = sampler.stop().anonymous_nbytes
    texts = [tokenizer.decode(tokens) for batch in batches for tokens in batch]
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}|{text}\n")
    weights = sum(parameter.nbytes for parameter in module.parameters())
    read = strategy.stats().read_nbytes
    print_table(
        {
            "weights": f"{weights / GB:.3f} GB",
            "peak anonymous memory": f"{peak / GB:.3f} GB (of it {at_start / GB:.3f} GB interpreter and libraries)",
            "read from the disk": f"{read / GB:.3f} GB for {args.tokens} tokens of each prompt",
        }
    )
    if args.json is not None:
        figures = {"texts": texts, "weights": weights, "anonymous": peak - at_start, "read": read}
        args.json.write_text(json.dumps(figures))


def _encode(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with a Hugging Face causal LM and its tokenizer")
    add("--prompt", action="append", required=True, help="may be given several times")
    add("--tokens", type=int, default=20, help="to generate for each prompt")
    add("--batch-size", type=int, default=8, help="prompts that share a pass over the weights")
    add("--accelerator", default="auto")
    add("--nvme-path", help="directory on the SSD; default: $LIGHTNING_SSD_PATH, else under the current directory")
    add("--host-memory", default="min", help='budget such as "2GiB", "auto" or "min"')
    add("--json", type=Path, help="write texts and figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
