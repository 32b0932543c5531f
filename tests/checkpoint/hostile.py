"""Thousands of damaged and hostile checkpoints through everything that reads one; run as a program, in a small process.

``python -m tests.checkpoint.hostile DIRECTORY SEED COUNT`` makes a checkpoint in DIRECTORY, changes it COUNT times and
reads it each time. It fails, naming the mutation's number, if a reader raises anything but our own errors, opens a file
outside the checkpoint, or needs memory that the files do not account for. Prints counts as JSON.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.convert.importing import open_source
from lightning_ssd.errors import CheckpointError, CorruptionError
from lightning_ssd.sizes import MiB
from tests.checkpoint.mutations import (
    FOLDER,
    INDEX,
    SECRET,
    UNIT,
    Mutation,
    Original,
    file_bytes,
    header_bytes,
    header_keys_twice,
    header_values,
    index_values,
    manifest_bytes,
    manifest_keys_twice,
    manifest_values,
    state_bytes,
)
from tests.checkpoint.support import Training

# ---------------------------------------------------------------------------------------------------------- readers


def read_all(path: Path) -> None:
    """Do everything a reader can do."""
    with CheckpointReader(path) as reader:
        for name in reader.parameter_names:
            for kind in reader.kinds(name):
                reader.tensor(name, kind).sum()
        for name in (*reader.parameter_names, *reader.manifest.aliases):
            reader.value(name)
        reader.buffers()
        reader.state()
        reader.optimizers()
        reader.verify()


def read_state_and_rest(path: Path) -> None:
    """The small files first: `read_all` would stop at an earlier fault."""
    with CheckpointReader(path) as reader:
        try:
            reader.state()
        finally:
            reader.buffers()


def read_weights(path: Path) -> None:
    """As a source of initial weights."""
    with open_source(path) as source:
        for name in source.shapes:
            source.value(name).load().sum()
            source.value(name).drop()


def read_folder(path: Path) -> None:
    """A Hugging Face folder, whose index names files."""
    read_weights(path / FOLDER)


def read_unit_file(path: Path) -> None:
    """A safetensors file alone, without the manifest that would contradict it."""
    read_weights(path / UNIT)


def resume(path: Path) -> None:
    """As `Trainer.fit(ckpt_path=...)` does."""
    from lightning_ssd.checkpoint.dictionary import open_dictionary

    open_dictionary(path, None)


def command_line(path: Path) -> None:
    """``inspect`` and ``verify``: an exit code, never a traceback."""
    from lightning_ssd.cli.main import main

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with redirect_stdout(out), redirect_stderr(out):
        codes = [main(["inspect", str(path), "--parameters"]), main(["verify", str(path)])]
    if any(codes):
        raise CheckpointError("exit code 1")


# -------------------------------------------------------------------------------------- which mutation for which reader

MUTATIONS: dict[Mutation, tuple[Callable[[Path], None], ...]] = {
    manifest_values: (read_all, read_weights, resume, command_line),
    manifest_keys_twice: (read_all,),
    manifest_bytes: (read_all, command_line),
    header_values: (read_all, read_state_and_rest, read_unit_file, resume),
    header_keys_twice: (read_all, read_state_and_rest, read_unit_file),
    header_bytes: (read_all, read_state_and_rest, read_unit_file),
    file_bytes: (read_all, resume, command_line),
    state_bytes: (read_state_and_rest, resume),
    index_values: (read_folder,),
}
WEIGHTS = (6, 1, 4, 6, 1, 4, 2, 2, 1)
assert len(WEIGHTS) == len(MUTATIONS)


# --------------------------------------------------------------------------------------------------------- the limits


class Opened:
    """Fails a reader that opens a file outside the checkpoint. An audit hook stays for the life of the process."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._watching = False
        self.outside: list[str] = []
        sys.addaudithook(self._on_event)

    @contextmanager
    def only_inside(self) -> Iterator[None]:
        self.outside.clear()
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
        if self.outside:
            raise AssertionError(f"opened outside the checkpoint: {self.outside}")

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        # Opening by a part of a path relative to a directory's descriptor is what `open_inside` does: where it leads
        # was checked there, and the canary's time of last access tells if it was wrong.
        if not self._watching or event != "open" or not isinstance(args[0], str | bytes):
            return
        self._watching = False
        path = os.fsdecode(args[0])
        real = os.path.realpath(path)
        # Sources of the interpreter's own modules are opened for the lines of a traceback or a warning.
        inside = real.startswith((self._root + "/", sys.prefix, sys.base_prefix)) or real == self._root
        if os.path.isabs(path) and not inside:
            self.outside.append(path)
        self._watching = True


def limit_memory(headroom_nbytes: int) -> None:
    """From now on the process may map this much more and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGESIZE") + headroom_nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def make_checkpoint(directory: Path) -> Path:
    """A checkpoint with every kind of file, and beside it files that nobody may read."""
    live = directory / "live"
    live.mkdir(parents=True)
    training = Training(
        live, shapes={"a": {"a.weight": (50, 7), "a.none": (0, 3)}, "b": {"b.scale": (), "b.bias": (5,)}}
    )
    training.advance()
    training.save(directory / "c")
    folder = directory / "c" / FOLDER
    folder.mkdir()
    shutil.copyfile(directory / "c" / UNIT, folder / "shard.safetensors")
    weight_map = {name: "shard.safetensors" for name in ("a.weight", "a.none")}
    (directory / "c" / INDEX).write_text(json.dumps({"metadata": {"total_size": 1400}, "weight_map": weight_map}))
    (directory / SECRET).write_bytes((directory / "c" / UNIT).read_bytes())
    (directory / "c" / "units" / "link.safetensors").symlink_to(directory / SECRET)
    return directory / "c"


def watch_access(path: Path) -> bool:
    """Make the next reading of a file show in its time of last access; False where the file system keeps none."""
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns))
    path.read_bytes()
    is_kept = os.stat(path).st_atime_ns != 0
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns))
    return is_kept


def main(directory: Path, seed: int, count: int) -> None:
    torch.set_num_threads(1)
    checkpoint = make_checkpoint(directory)
    is_watched = watch_access(directory / SECRET)
    original = Original(checkpoint)
    opened = Opened(checkpoint)
    readers = (read_all, read_state_and_rest, read_weights, read_unit_file, read_folder, resume, command_line)
    for _ in range(2):  # lazy imports and caches
        for reader in readers:
            reader(checkpoint)
    tracemalloc.start()
    for reader in readers:
        reader(checkpoint)
    usual_nbytes = tracemalloc.get_traced_memory()[1]
    # Python's own lists and the allocator's arenas; a tensor of a made-up size would be far beyond.
    limit_memory(16 * MiB)
    outcomes: Counter[str] = Counter()
    worst_nbytes = 0
    mutations = list(MUTATIONS)
    for index in range(count):
        rng = random.Random(f"{seed}:{index}")
        (mutation,) = rng.choices(mutations, WEIGHTS)
        mutation(rng, original)
        sizes = sum(os.lstat(path).st_size for path in checkpoint.rglob("*"))
        reader = rng.choice(MUTATIONS[mutation])
        where = f"mutation {seed}:{index}, {mutation.__name__} read by {reader.__name__}"
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        outcome = _read(reader, checkpoint, opened, where)
        used = tracemalloc.get_traced_memory()[1] - before
        worst_nbytes = max(worst_nbytes, used)
        # A JSON document becomes Python objects of some 20 times its size.
        if used > usual_nbytes + 20 * sizes:
            raise AssertionError(f"{where}: {used} bytes of memory for files of {sizes} bytes")
        outcomes[f"{mutation.__name__}: {outcome}"] += 1
        original.restore()
    if is_watched and os.stat(directory / SECRET).st_atime_ns:
        raise AssertionError("a file outside the checkpoint was read")
    found = {"worst_nbytes": worst_nbytes, "usual_nbytes": usual_nbytes, "is_watched": is_watched}
    print(json.dumps(found | {"outcomes": dict(sorted(outcomes.items()))}))


def _read(reader: Callable[[Path], None], checkpoint: Path, opened: Opened, where: str) -> str:
    try:
        with opened.only_inside():
            reader(checkpoint)
    except (CheckpointError, CorruptionError) as error:
        text = str(error)
        # A refusal of memory by the limit may come dressed as a file that cannot be read.
        if "memory" in text.lower() and "allocate" in text.lower():
            raise AssertionError(f"{where}: asked for memory it was refused: {text[:500]}") from error
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {str(error)[:500]}") from error
    return "accepted"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
