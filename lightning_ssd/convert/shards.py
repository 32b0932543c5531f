"""How a state dict is cut into the files of a Hugging Face folder. Pure arithmetic; sizes in bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_ssd.errors import CheckpointError

HF_INDEX = "model.safetensors.index.json"
HF_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Shard:
    """One file: name in the file -> name in the state dict."""

    file: str
    names: Mapping[str, str]
    nbytes: int


_COMPILED = "_orig_mod."
"""What `torch.compile` puts before the names of the module that it wraps."""


def attribute_of_all(names: Iterable[str]) -> str:
    """The front ``"NAME."`` of all ``names``: the one attribute of a LightningModule that holds them; else empty."""
    fronts = {name.partition(".")[0] + "." for name in names}
    front = fronts.pop() if len(fronts) == 1 else ""
    return front if all(name.startswith(front) for name in names) else ""


def pretrained_names(names: Sequence[str], prefix: str, where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The names that ``save_pretrained`` writes -> those of the state dict, and the ones that have no ``prefix``.

    Args:
        names: Of the state dict.
        prefix: What they begin with.
        where: What messages call the state dict.

    Raises:
        CheckpointError: Two tensors get one name, or none begins with the prefix.
    """
    found: dict[str, str] = {}
    left_out = []
    for name in names:
        if not name.startswith(prefix) or name == prefix:
            left_out.append(name)
            continue
        plain = name[len(prefix) :].replace(_COMPILED, "")
        if plain in found:
            raise CheckpointError(f"{found[plain]!r} and {name!r} are both {plain!r} without {_COMPILED!r}")
        found[plain] = name
    if not found:
        raise CheckpointError(f"no tensor of {where!r} begins with {prefix!r}; there is {next(iter(names), '')!r}")
    return found, tuple(left_out)


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
