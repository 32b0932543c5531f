"""Token samples of a text file, or of conversations, for ``finetune_lm.py`` and ``lora.py``.

A text file is cut into disjoint windows. A JSONL file has a conversation per line, ``{"messages": [{"role": "user",
"content": "..."}, {"role": "assistant", "content": "..."}]}``. The tokenizer's chat template makes a sample of each,
and only what the assistant says is trained on. The last twentieth of either file is held out.

As a program it tokenises, once and in a process of its own: ``python lm_data.py MODEL_DIR FILE OUT.npz``. A tokenizer
with a large vocabulary takes hundreds of MB, which would otherwise count in the memory that the training run reports.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

HELD_OUT_SHARE = 0.05

HELD_OUT_BATCH_SIZE = 8
"""Samples per held-out batch. Without gradients there is room for many, and each batch is a pass over the weights."""

IGNORED = -100
"""Label of a token that is read but not trained on, as torch's cross entropy has it."""


class Sample(NamedTuple):
    """Tokens, and the labels to be predicted from those before them."""

    tokens: torch.Tensor  # int64 [seq_len + 1]; [batch, seq_len + 1] in a batch
    labels: torch.Tensor  # the tokens, or IGNORED


class Tokens(NamedTuple):
    """A tokenised text: ``prefix`` is the BOS token, where the tokenizer has one."""

    prefix: np.ndarray  # 1D int32
    text: np.ndarray  # 1D int32


class Conversation(NamedTuple):
    """A tokenised conversation."""

    tokens: np.ndarray  # 1D int32
    is_answer: np.ndarray  # 1D bool, of the same length: the assistant's words, and the end of what it says


def load_samples(model_dir: Path, file: Path, cache_dir: Path, seq_len: int) -> tuple[Dataset[Sample], Dataset[Sample]]:
    """Training and held-out samples of ``file``: conversations if it is called ``*.jsonl``, else windows of text."""
    with np.load(_tokenized(model_dir, file, cache_dir)) as arrays:
        if file.suffix == ".jsonl":
            bounds = [0, *arrays["ends"].tolist()]
            parts = [slice(*pair) for pair in pairwise(bounds)]
            tokens, is_answer = arrays["tokens"], arrays["is_answer"]
            talks = [Conversation(tokens[part], is_answer[part]) for part in parts]
            cut = min(int(len(talks) * (1 - HELD_OUT_SHARE)), len(talks) - 1)
            padding = int(arrays["padding"])
            return Conversations(talks[:cut], seq_len, padding), Conversations(talks[cut:], seq_len, padding)
        prefix, text = arrays["prefix"], arrays["text"]
        cut = int(len(text) * (1 - HELD_OUT_SHARE))
        return Windows(Tokens(prefix, text[:cut]), seq_len), Windows(Tokens(prefix, text[cut:]), seq_len)


def _tokenized(model_dir: Path, file: Path, cache_dir: Path) -> Path:
    """File of token arrays, in ``cache_dir`` already when this file met this tokenizer before."""
    key = hashlib.sha256(file.suffix.encode() + file.read_bytes())
    for part in sorted([*model_dir.glob("*token*"), *model_dir.glob("chat_template*")]):
        key.update(f"{part.name} {part.stat().st_size} {part.stat().st_mtime_ns}".encode())
    cached = cache_dir / f"tokens-{key.hexdigest()[:16]}.npz"
    if not cached.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, str(model_dir), str(file), str(cached)], check=True)
    return cached


class Windows(Dataset[Sample]):
    """Disjoint windows of a token sequence, each ``seq_len + 1`` long. Every token is trained on."""

    def __init__(self, tokens: Tokens, seq_len: int) -> None:
        self._prefix = torch.from_numpy(tokens.prefix.astype(np.int64))
        self._stride = seq_len + 1 - len(self._prefix)
        num_windows = len(tokens.text) // self._stride
        if num_windows == 0:
            raise SystemExit(f"{len(tokens.text)} tokens are too few for windows of {seq_len}; use a shorter --seq-len")
        self._body = torch.from_numpy(tokens.text[: num_windows * self._stride].astype(np.int64))

    def __len__(self) -> int:
        return len(self._body) // self._stride

    def __getitem__(self, index: int) -> Sample:
        tokens = torch.cat([self._prefix, self._body[index * self._stride : (index + 1) * self._stride]])
        return Sample(tokens, tokens)


class Conversations(Dataset[Sample]):
    """One conversation per sample, cut or padded to ``seq_len + 1`` tokens.

    Padding comes last, so that no token that counts sees it: a causal model needs no attention mask for it. A
    conversation whose first answer begins past the cut is left out.
    """

    def __init__(self, talks: list[Conversation], seq_len: int, padding: int) -> None:
        self._talks = [talk for talk in talks if talk.is_answer[1 : seq_len + 1].any()]
        self._length = seq_len + 1
        self._padding = padding
        if not self._talks:
            raise SystemExit(f"no answer begins within {seq_len} tokens; use a longer --seq-len")

    def __len__(self) -> int:
        return len(self._talks)

    def __getitem__(self, index: int) -> Sample:
        talk = self._talks[index]
        known = torch.from_numpy(talk.tokens[: self._length].astype(np.int64))
        tokens = torch.full((self._length,), self._padding)
        tokens[: len(known)] = known
        labels = torch.full((self._length,), IGNORED)
        labels[: len(known)] = torch.where(torch.from_numpy(talk.is_answer[: self._length]), known, IGNORED)
        return Sample(tokens, labels)


class SampleLoaders:
    """Loaders over samples. The order of training follows from the seed alone, so that a resumed run sees what the
    uninterrupted one would have seen."""

    def __init__(self, train: Dataset[Sample], held_out: Dataset[Sample], batch_size: int, seed: int) -> None:
        self.train: Any = train
        self.held_out: Any = held_out
        self.batch_size = batch_size
        self._seed = seed

    def train_loader(self, first_batch: int, last_batch: int) -> DataLoader[Sample]:
        """Batches ``first_batch`` up to, not including, ``last_batch`` of the endless shuffled sequence."""
        first, last = first_batch * self.batch_size, last_batch * self.batch_size
        generator = torch.Generator().manual_seed(self._seed)
        order: list[int] = []
        while len(order) < last:
            order += torch.randperm(len(self.train), generator=generator).tolist()
        return DataLoader(self.train, batch_size=self.batch_size, sampler=order[first:last])

    def held_out_loader(self, num_batches: int) -> DataLoader[Sample]:
        """The same ``num_batches`` every time, spread evenly over the held-out samples."""
        num = min(num_batches * HELD_OUT_BATCH_SIZE, len(self.held_out))
        spread = np.linspace(0, len(self.held_out) - 1, num).astype(int).tolist()
        return DataLoader(self.held_out, batch_size=HELD_OUT_BATCH_SIZE, sampler=spread)


def apply_chat_template(tokenizer: Any, messages: list[dict[str, str]]) -> Conversation:
    """Tokens of a conversation up to its last answer, and which of them the assistant says.

    An answer is what the template adds to the turns before it and the mark that an answer begins. A template that
    changes earlier turns, or that mark, is refused: which of its tokens the assistant says cannot be told.
    """
    text = ""
    answers: list[tuple[int, int]] = []  # first character, and the one after the last
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            opened = _render(tokenizer, messages[: number - 1], add_generation_prompt=True)
            whole = _render(tokenizer, messages[:number], add_generation_prompt=False)
            if not (opened.startswith(text) and whole.startswith(opened)):
                raise SystemExit(f"the chat template changes what is before turn {number}: use one that only appends")
            answers.append((len(opened), len(whole)))
            text = whole
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])
    is_answer = np.zeros(len(starts), bool)
    for first, end in answers:
        is_answer |= (starts >= first) & (starts < end)
    return Conversation(np.asarray(encoded["input_ids"], np.int32), is_answer)


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return text


def _tokenize(model_dir: str, file: str, out: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    text = Path(file).read_text(encoding="utf-8")
    arrays = _tokenize_chat(tokenizer, text) if file.endswith(".jsonl") else _tokenize_text(tokenizer, text)
    partial = Path(out).with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.rename(out)  # a run that is stopped here leaves no half-written cache


def _tokenize_text(tokenizer: Any, text: str) -> dict[str, np.ndarray]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return {"prefix": np.asarray(prefix, np.int32), "text": np.asarray(ids, np.int32)}


def _tokenize_chat(tokenizer: Any, text: str) -> dict[str, np.ndarray]:
    if tokenizer.chat_template is None:
        raise SystemExit(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set tokenizer.chat_template")
    talks = [apply_chat_template(tokenizer, json.loads(line)["messages"]) for line in text.splitlines() if line.strip()]
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {
        "tokens": np.concatenate([talk.tokens for talk in talks]),
        "is_answer": np.concatenate([talk.is_answer for talk in talks]),
        "ends": np.cumsum([len(talk.tokens) for talk in talks]),
        "padding": np.asarray(padding or 0),
    }


if __name__ == "__main__":
    _tokenize(*sys.argv[1:])
