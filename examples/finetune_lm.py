"""Fine-tunes all weights of a Hugging Face causal language model, its state streamed from the SSD.

    python finetune_lm.py --model DIR --text FILE.txt --steps 30
    python finetune_lm.py --model DIR --text FILE.txt --steps 40 --resume out/step-30.ckpt
    python finetune_lm.py --model DIR --text FILE.jsonl --steps 30

DIR is what ``save_pretrained`` writes, safetensors and tokenizer. A JSONL file has conversations: the chat template of
the tokenizer makes samples of them, and only the assistant's words are trained on (``lm_data.py``). Afterwards a table
says what it cost.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from lm_data import IGNORED, Sample, SampleLoaders, load_samples
from report import Figures, IoCount, MemorySampler, StepLog, append_json_line, machine_facts, memory_now, print_table
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from typing_extensions import override

WARMUP_STEPS = 5


class CausalLM(LightningModule):
    """A causal language model; nothing in it knows where its weights are.

    Args:
        model_dir: Folder written by ``save_pretrained``.
        data: Samples to train on, and held-out ones.
        num_batches: Where training ends, in batches from the very first.
        num_eval_batches: Batches of a held-out evaluation.
        lr: Learning rate after warm-up.
        loss_slice: Positions whose logits exist at a time.
    """

    def __init__(
        self, model_dir: Path, data: SampleLoaders, num_batches: int, num_eval_batches: int, lr: float, loss_slice: int
    ) -> None:
        super().__init__()
        self.model: Any = None
        self.model_dir = model_dir
        self.data = data
        self.num_batches = num_batches
        self.num_eval_batches = num_eval_batches
        self.lr = lr
        self.loss_slice = loss_slice
        self.held_out: list[tuple[int, list[float]]] = []  # (steps so far, loss of each sample); in the checkpoint
        self._sample_losses: list[float] = []

    @override
    def configure_model(self) -> None:
        # Here and not in __init__: the strategy then puts each weight where it belongs as it is created.
        if self.model is None:
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(
                self.model_dir, dtype=torch.float32, local_files_only=True
            ).train()

    @property
    def language_model(self) -> Any:
        """The model of transformers."""
        return self.model

    def token_losses(self, batch: Sample) -> torch.Tensor:
        """Cross entropy of each next token, ``[batch, seq_len]``; 0 where it is not trained on."""
        hidden = self.language_model.base_model(input_ids=batch.tokens[:, :-1], use_cache=False).last_hidden_state
        states = hidden.flatten(0, 1).split(self.loss_slice)  # each [loss_slice, hidden_size]
        labels = batch.labels[:, 1:].flatten().split(self.loss_slice)  # each [loss_slice]
        if len(states) == 1:
            return self._slice_losses(states[0], labels[0]).view(len(batch.tokens), -1)
        # All logits of a large vocabulary at once can need more memory than the model: 1024 positions x 262,144 tokens
        # is 1 GB, and as much again for the gradient. Each slice's are made, used, and made again in backward.
        losses = [
            checkpoint(self._slice_losses, *pair, use_reentrant=False, preserve_rng_state=False)
            for pair in zip(states, labels, strict=True)
        ]
        return torch.cat(losses).view(len(batch.tokens), -1)

    def _slice_losses(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self._logits(states).float(), labels, ignore_index=IGNORED, reduction="none")

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.language_model.get_output_embeddings()(states)
        cap = getattr(self.language_model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @override
    def training_step(self, batch: Sample, batch_idx: int) -> torch.Tensor:
        loss = self.token_losses(batch).sum() / num_trained(batch).sum()
        self.log("loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        if self.trainer.sanity_checking and batch_idx == 0:
            self._check_logits(batch.tokens[:1, :8])
        self._sample_losses += (self.token_losses(batch).sum(1) / num_trained(batch)).tolist()

    def _check_logits(self, tokens: torch.Tensor) -> None:
        """A model that does more to its logits than we know of would train on a wrong loss, and nobody would see."""
        own = self.language_model(input_ids=tokens, use_cache=False).logits
        ours = self._logits(self.language_model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
        if not torch.allclose(own.float(), ours.float(), rtol=1e-2, atol=1e-2):
            raise SystemExit(
                f"{type(self.language_model).__name__} treats its logits in a way that this script does not know"
            )

    @override
    def on_validation_epoch_end(self) -> None:
        self.held_out.append((self.trainer.global_step, self._sample_losses))
        self._sample_losses = []

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["held_out"] = self.held_out

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.held_out = checkpoint["held_out"]

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    @override
    def train_dataloader(self) -> DataLoader[Sample]:
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return self.data.train_loader(first, self.num_batches)

    @override
    def val_dataloader(self) -> DataLoader[Sample]:
        return self.data.held_out_loader(self.num_eval_batches)


def num_trained(batch: Sample) -> torch.Tensor:
    """Tokens that each sample of a batch is trained on, ``[batch]``."""
    return batch.labels[:, 1:].ne(IGNORED).sum(1)


def main() -> None:
    """Train all weights, save, report."""
    args = make_parser(__doc__).parse_args()
    seed_everything(args.seed, verbose=False)
    train(CausalLM(*module_arguments(args)), args)


def module_arguments(args: argparse.Namespace) -> tuple[Any, ...]:
    """What a ``CausalLM`` is made of."""
    samples = load_samples(args.model, args.text, args.out, args.seq_len)
    data = SampleLoaders(*samples, args.batch_size, args.seed)
    return args.model, data, args.steps * args.accumulate, args.eval_batches, args.lr, args.loss_slice


def train(module: CausalLM, args: argparse.Namespace) -> None:
    """Train ``module``, save a checkpoint, say what it cost."""
    strategy, count_io = make_strategy(args)
    steps = StepLog(count_io)
    trainer = Trainer(
        strategy=strategy,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        max_steps=args.steps,
        gradient_clip_val=args.clip,
        accumulate_grad_batches=args.accumulate,
        num_sanity_val_steps=-1,  # the whole held-out evaluation, before the first step
        enable_checkpointing=False,  # one checkpoint, at the end
        enable_model_summary=False,  # its sizes count what is in memory
        logger=False,
        log_every_n_steps=1,
        callbacks=[steps],
        default_root_dir=args.out,
    )
    memory_at_start = memory_now()
    sampler = MemorySampler()
    sampler.start()
    trainer.fit(module, ckpt_path=args.resume)
    checkpoint_path = args.out / f"step-{trainer.global_step}.ckpt"
    trainer.save_checkpoint(checkpoint_path)
    config = module.language_model.config.get_text_config()
    figures = Figures(
        num_params=sum(p.numel() for p in module.parameters()),
        num_trained_params=sum(p.numel() for p in module.parameters() if p.requires_grad),
        logits_nbytes=args.batch_size * args.seq_len * config.vocab_size * 4,
        tokens_per_step=args.batch_size * args.seq_len * args.accumulate,
        num_steps=steps.num_steps,
        step_s=steps.step_s(),
        io=steps.io_per_step(),
        losses=steps.losses,
        held_out=module.held_out,
        memory_at_start=memory_at_start,
        memory_peak=sampler.stop(),
        checkpoint=checkpoint_path,
    )
    print_table(figures.rows())
    if args.json is not None:
        record = {"settings": vars(args), "machine": machine_facts(args.out), "figures": asdict(figures)}
        append_json_line(args.json, record)


def make_strategy(args: argparse.Namespace) -> tuple[str | Strategy, Any]:
    """What ``Trainer(strategy=...)`` gets, and a function that counts the bytes it moves (None: it moves none)."""
    if args.strategy != "ssd_offload":
        return args.strategy, None
    from lightning_ssd import SSDOffloadStrategy

    strategy = SSDOffloadStrategy(nvme_path=args.nvme_path, host_memory=args.host_memory)

    def count_io() -> IoCount:
        stats = strategy.stats()
        return IoCount(stats.read_nbytes, stats.written_nbytes)

    return strategy, count_io


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with a Hugging Face causal LM and its tokenizer")
    add("--text", type=Path, required=True, help="text, or conversations as *.jsonl; the last twentieth is held out")
    add("--out", type=Path, default=Path("out"), help="checkpoint and token cache go here")
    add("--resume", type=Path, help="checkpoint to continue from; --steps counts from the very first step")
    add("--steps", type=int, default=30, help="optimizer steps")
    add("--batch-size", type=int, default=1)
    add("--seq-len", type=int, default=256)
    add("--accumulate", type=int, default=1, help="batches per optimizer step")
    add("--lr", type=float, default=2e-5)
    add("--clip", type=float, help="clip gradients to this global norm")
    add("--precision", default="32-true", help="32-true, bf16-mixed or bf16-true")
    add("--eval-batches", type=int, default=4, help="held-out batches, of 8 samples each, before and after")
    add("--loss-slice", type=int, default=256, help="positions whose logits exist at a time")
    add("--seed", type=int, default=0)
    add("--strategy", default="ssd_offload", help="ssd_offload, or a plain Lightning one to compare with: auto")
    add("--accelerator", default="auto")
    add("--nvme-path", help="directory on the SSD; default: $LIGHTNING_SSD_PATH, else under --out")
    add("--host-memory", default="auto", help='budget such as "2GiB", "auto" or "min"')
    add("--json", type=Path, help="append the figures to this file as one line")
    return parser


if __name__ == "__main__":
    main()
