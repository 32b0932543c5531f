"""No unit of a real architecture is much larger than its blocks, but for what is one tensor."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.bench_cut import describe, models

FEW = {
    "albert", "bart", "convnext", "deepseek_v3", "detr", "efficientnet", "gemma3_text", "jamba", "mt5", "nllb-moe",
    "rwkv", "segformer", "swin", "vits", "wav2vec2", "zamba2",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.soak) for n in models()])
def test_units_are_bounded(name: str) -> None:
    with torch.device("meta"):
        found = describe(models()[name]())
    assert found["num_blocks"] > 0
    assert found["rest"] <= 4
    # Millions of elements. A block that is large itself is one of a late stage, or one of a kind.
    assert found["largest_apart"] <= max(8 * found["median_block"], 8)
