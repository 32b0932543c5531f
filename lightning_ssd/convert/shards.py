"""How a state dict is cut into the files of a Hugging Face folder. Pure arithmetic; sizes in bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

HF_INDEX = "model.safetensors.index.json"
HF_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Shard:
    """One file: name in the file -> name in the state dict."""

    file: str
    names: Mapping[str, str]
    nbytes: int


def strip_prefix(names: Iterable[str], prefix: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names without the prefix -> with it, and those that do not have it."""
    every = tuple(names)
    return (
        {name[len(prefix) :]: name for name in every if name.startswith(prefix) and name != prefix},
        tuple(name for name in every if not name.startswith(prefix) or name == prefix),
    )


def cut_shards(sizes: Mapping[str, int], names: Mapping[str, str], max_nbytes: int) -> list[Shard]:
    """Fill files in order up to ``max_nbytes``; a larger tensor is alone in its file.

    Args:
        sizes: Bytes of each tensor, by its name in the state dict.
        names: Name in the files -> name in the state dict.
        max_nbytes: Bytes of a file.
    """
    groups: list[tuple[dict[str, str], int]] = [({}, 0)]
    for name, source in names.items():
        nbytes = sizes[source]
        group, filled = groups[-1]
        if group and filled + nbytes > max_nbytes:
            group, filled = {}, 0
            groups.append((group, filled))
        group[name] = source
        groups[-1] = (group, filled + nbytes)
    if len(groups) == 1:
        return [Shard(HF_SINGLE, *groups[0])]
    return [Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", *group) for i, group in enumerate(groups, 1)]


def index_text(shards: Sequence[Shard]) -> str:
    """The index of several shards."""
    weight_map = {name: shard.file for shard in shards for name in shard.names}
    total = sum(shard.nbytes for shard in shards)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
