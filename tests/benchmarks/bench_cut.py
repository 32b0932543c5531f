"""How models of many architectures are cut into units, at their real sizes, on the meta device: no memory, no network.

python tests/benchmarks/bench_cut.py [--out docs/results/cut.jsonl] [--only NAME ...]

One JSON line for each model: units, the largest against the median block, the smallest budget of a training with Adam
in float32. transformers and diffusers make the models from configurations; what is not installed is said and left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_ssd.memory.plan import Demand, UnitSize, make_plan
from lightning_ssd.units.model_units import chains
from lightning_ssd.units.partition import partition
from lightning_ssd.units.unit import Unit
from tests.benchmarks.support import emit, facts, say

BIG = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
LARGE_MODEL: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}

TRANSFORMERS: Mapping[str, Mapping[str, Any]] = {
    "albert": {"hidden_size": 4096, "num_attention_heads": 64, "intermediate_size": 16384, "num_hidden_layers": 12},
    "audio-spectrogram-transformer": {},
    "bart": {},
    "beit": {},
    "bert": {**LARGE_MODEL, "intermediate_size": 4096},
    "big_bird": {},
    "blip": {},
    "bloom": {"hidden_size": 1024, "n_layer": 24, "n_head": 16},
    "canine": {},
    "clip": {},
    "clap": {},
    "convbert": {},
    "convnext": {},
    "convnextv2": {},
    "cvt": {},
    "deberta-v2": {},
    "deepseek_v3": {},
    "deit": {},
    "detr": {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False},
    "dinov2": {},
    "distilbert": {},
    "efficientnet": {},
    "electra": {},
    "encodec": {},
    "esm": {"vocab_size": 33, "hidden_size": 1280, "num_hidden_layers": 33, "num_attention_heads": 20,
            "intermediate_size": 5120, "pad_token_id": 1},
    "falcon": {},
    "fnet": {},
    "focalnet": {},
    "funnel": {"block_sizes": [4, 4, 4]},
    "gemma": {},
    "gemma3_text": {},
    "gpt2": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "gpt_neox": {},
    "gpt_oss": {},
    "granitemoe": {"num_local_experts": 8},
    "hiera": {},
    "jamba": {},
    "led": {},
    "levit": {},
    "llama": BIG,
    "longformer": {"attention_window": [512] * 12},
    "longt5": {},
    "mamba": {},
    "mamba2": {},
    "marian": {},
    "mixtral": {},
    "mobilebert": {},
    "mobilenet_v2": {},
    "mobilevit": {},
    "modernbert": {},
    "mt5": {},
    "nllb-moe": {},
    "olmoe": {},
    "opt": {},
    "owlvit": {},
    "pegasus": {},
    "perceiver": {},
    "phi3": {},
    "poolformer": {},
    "pvt": {},
    "qwen3": {},
    "qwen3_moe": {},
    "reformer": {},
    "regnet": {},
    "rwkv": {},
    "resnet": {},
    "roberta": {},
    "sam": {},
    "seamless_m4t_v2": {},
    "segformer": {"depths": [3, 6, 40, 3], "hidden_sizes": [64, 128, 320, 512]},
    "siglip": {},
    "speech_to_text": {},
    "speecht5": {},
    "squeezebert": {},
    "swin": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]},
    "swinv2": {},
    "switch_transformers": {"num_layers": 12, "num_experts": 128},
    "t5": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "timesformer": {},
    "vilt": {},
    "vit": {},
    "vit_mae": {},
    "vits": {},
    "wav2vec2": {},
    "wav2vec2-conformer": {},
    "wavlm": {},
    "whisper": {"d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "encoder_attention_heads": 20,
                "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120},
    "xlm-roberta": {},
    "xlnet": {},
    "yolos": {},
    "zamba2": {},
}  # fmt: skip
"""Overrides of transformers' default configurations, by model type; the defaults are mostly a published model's."""

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}
DIFFUSERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sdxl_unet": ("UNet2DConditionModel", SDXL),
    "sd_unet": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "ddpm_unet": ("UNet2DModel", {}),
    "vae": (
        "AutoencoderKL",
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
        },
    ),
    "dit": ("DiTTransformer2DModel", {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}),
    "flux": ("FluxTransformer2DModel", {}),
}


def models() -> dict[str, Callable[[], nn.Module]]:
    """What can be made here, by name."""
    found: dict[str, Callable[[], nn.Module]] = {}
    try:
        import transformers
    except ImportError:
        say("transformers is not installed: its models are left out")
    else:
        transformers.logging.set_verbosity_error()
        for name, overrides in TRANSFORMERS.items():
            found[name] = lambda name=name, overrides=overrides: transformers.AutoModel.from_config(
                transformers.AutoConfig.for_model(name, architectures=[], **overrides)
            )
    try:
        import diffusers
    except ImportError:
        say("diffusers is not installed: its models are left out")
    else:
        for name, (cls, arguments) in DIFFUSERS.items():
            found[name] = lambda cls=cls, arguments=arguments: getattr(diffusers, cls)(**arguments)
    return found


def smallest_nbytes(root: nn.Module, units: list[Unit]) -> int:
    """The smallest budget that trains ``root`` with Adam in float32, which recomputes its blocks."""
    sizes = [
        UnitSize(
            unit.name,
            unit.layout.buffer_nbytes,
            unit.layout.data_nbytes,
            unit.layout.numel,
            unit.layout.itemsize,
            8,
            2 * unit.layout.buffer_nbytes,
            is_persistent=unit.persistent,
        )
        for unit in units
    ]
    recomputes = any(unit.block is not None for unit in units)
    return make_plan(
        sizes, chains(root, units), budget_nbytes=None, demand=Demand(recomputes=recomputes)
    ).smallest_nbytes


def describe(root: nn.Module) -> dict[str, Any]:
    """Figures of one cut, in millions of elements; ``largest_apart`` is of units that are not mostly one tensor."""
    specs = partition(root)
    units = [Unit(spec) for spec in specs]
    numel = {unit.name: unit.layout.numel for unit in units}
    blocks: dict[nn.Module, int] = {}
    for unit in units:
        if unit.block is not None:
            blocks[unit.block] = blocks.get(unit.block, 0) + unit.layout.numel
    largest = max(numel, key=lambda name: numel[name])
    largest_tensor = max(param.numel() for param in root.parameters())
    apart = [unit.layout.numel for unit in units if 2 * max(p.numel() for p in unit.params) < unit.layout.numel]
    median = statistics.median(blocks.values()) if blocks else statistics.median(numel.values())
    return {
        "million_params": sum(numel.values()) / 1e6,
        "num_units": len(units),
        "num_blocks": len(blocks),
        "median_block": median / 1e6,
        "largest_unit": largest,
        "largest": numel[largest] / 1e6,
        "largest_to_median": numel[largest] / median,
        "largest_apart": max(apart, default=0) / 1e6,
        "largest_tensor": largest_tensor / 1e6,
        "rest": numel.get("rest", 0) / 1e6,
        "smallest_budget_mib": smallest_nbytes(root, units) / 2**20,
    }


def main() -> None:
    """Cut every model and write its line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", help="append the JSON lines to this file")
    parser.add_argument("--only", nargs="*", help="names of models")
    arguments = parser.parse_args()
    versions = {}
    for package in ("transformers", "diffusers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    common = facts() | versions
    for name, make in models().items():
        if arguments.only and name not in arguments.only:
            continue
        try:
            with torch.device("meta"):
                root = make()
        except Exception as error:  # of a package's own; the line says which
            say(f"{name}: {type(error).__name__}: {str(error)[:150]}")
            continue
        emit({"benchmark": "cut", "model": name} | describe(root) | common, arguments.out)


if __name__ == "__main__":
    main()
