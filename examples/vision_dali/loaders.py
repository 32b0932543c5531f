"""Two loaders of one interface over a folder of images: NVIDIA DALI, and plain torch.

A training loader is an endless sequence of batches, which the Trainer cuts into epochs of ``len(loader)``. It has
``state_dict`` and ``load_state_dict``, so Lightning saves it with each checkpoint: a run that is resumed in the middle
of an epoch goes on with the very images that would have come next.

A batch is ``(images, labels)``: float32 ``[batch, 3, height, width]``, about -2 to 2, and int64 ``[batch]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

MEAN, DEVIATION = 127.5, 64.0
Batch = tuple[torch.Tensor, torch.Tensor]


class TorchLoader:
    """Images by Pillow, in a plain ``DataLoader``.

    Args:
        folder: Has one sub-folder per class.
        batch_size: Images in a batch.
        training: Shuffle, mirror at random, and leave out what does not fill a batch.
        seed: Of order and mirroring.
        device_id: Not used: images are made in host memory.
    """

    def __init__(self, folder: Path, batch_size: int, *, training: bool, seed: int, device_id: int | None) -> None:
        self._images = _Images(folder)
        self._batch_size = batch_size
        self._training = training
        self._seed = seed
        self._num_batches = 0  # given out since the first epoch began

    def __len__(self) -> int:
        whole, part = divmod(len(self._images), self._batch_size)
        return whole if self._training else whole + bool(part)

    def __iter__(self) -> Iterator[Batch]:
        if not self._training:
            yield from DataLoader(self._images, batch_size=self._batch_size)
            return
        epoch, first = divmod(self._num_batches, len(self))
        random = torch.Generator().manual_seed(self._seed + epoch)
        order = torch.randperm(len(self._images), generator=random).tolist()
        is_mirrored = torch.rand(len(order), generator=random) < 0.5
        rest = order[first * self._batch_size : len(self) * self._batch_size]
        for images, labels in DataLoader(self._images, batch_size=self._batch_size, sampler=rest):
            begin = self._num_batches % len(self) * self._batch_size
            mirrored = is_mirrored[begin : begin + self._batch_size, None, None, None]
            self._num_batches += 1  # before the batch is used: a checkpoint counts the batch it was saved in
            yield torch.where(mirrored, images.flip(-1), images), labels

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from."""
        return {"num_batches": self._num_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches of ``state``."""
        self._num_batches = state["num_batches"]


class _Images(Dataset[Batch]):
    def __init__(self, folder: Path) -> None:
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        self._files = [(path, label) for label, name in enumerate(classes) for path in sorted(name.iterdir())]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Batch:
        from PIL import Image

        path, label = self._files[index]
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32))  # [height, width, 3]
        return (pixels.permute(2, 0, 1) - MEAN) / DEVIATION, torch.tensor(label)


class DALILoader:
    """Images by an NVIDIA DALI pipeline, decoded on the GPU if there is one. It needs the extra ``dali``.

    Args:
        folder: Has one sub-folder per class.
        batch_size: Images in a batch.
        training: Shuffle and mirror at random.
        seed: Of order and mirroring.
        device_id: Number of the GPU; None builds a pipeline of the CPU alone.
    """

    def __init__(self, folder: Path, batch_size: int, *, training: bool, seed: int, device_id: int | None) -> None:
        self._folder = folder
        self._settings = {"batch_size": batch_size, "device_id": device_id, "seed": seed, "num_threads": 2}
        self._training = training
        num_images = sum(1 for path in folder.rglob("*") if path.is_file())
        self._length = num_images // batch_size if training else -(-num_images // batch_size)
        self._saved: bytes | None = None  # state from which the next pipeline starts
        self._batches: Any = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        # Training goes on where it was. Validation starts from the first image, also after a pass that was cut short:
        # a pipeline cannot go back, so it is built anew.
        if self._batches is None or not self._training:
            self._batches = self._build()
        for (batch,) in islice(self._batches, len(self)):
            yield batch["images"], batch["labels"].flatten().long()

    def _build(self) -> Any:
        from nvidia.dali import pipeline_def
        from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

        define = pipeline_def(_decode, enable_checkpointing=True, **self._settings)
        decoder = "cpu" if self._settings["device_id"] is None else "mixed"
        pipeline = define(self._folder, self._training, decoder, checkpoint=self._saved)
        # Without the name of its reader the iterator has no end: the reader begins again, in another order.
        reader = None if self._training else "files"
        return DALIGenericIterator(
            pipeline,
            ["images", "labels"],
            reader_name=reader,
            last_batch_policy=LastBatchPolicy.PARTIAL,
            prepare_first_batch=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """State of the pipeline's reader and random numbers after the batches that were used."""
        return {"pipeline": self._saved if self._batches is None else self._batches.checkpoints()[0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches of ``state``."""
        self._saved, self._batches = state["pipeline"], None


def _decode(folder: Path, training: bool, decoder: str) -> Any:
    """The graph of the pipeline: read, decode, mirror, normalise."""
    from nvidia.dali import fn, types

    files, labels = fn.readers.file(
        file_root=str(folder), random_shuffle=training, initial_fill=1024, pad_last_batch=not training, name="files"
    )
    images = fn.decoders.image(files, device=decoder, output_type=types.RGB)
    images = fn.crop_mirror_normalize(
        images,
        mirror=fn.random.coin_flip(probability=0.5) if training else 0,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[MEAN] * 3,
        std=[DEVIATION] * 3,
    )
    return images, labels
