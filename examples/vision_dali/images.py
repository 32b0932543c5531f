"""Makes a folder of small JPEG files, one sub-folder per class: no download is needed to try the example.

    python images.py FOLDER

The classes are four directions of stripes. Colours, widths and phases are random, and there is noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("diagonal", "falling", "horizontal", "vertical")
SIZE = 64
_NORMALS = {"diagonal": (0.7, 0.7), "falling": (0.7, -0.7), "horizontal": (1.0, 0.0), "vertical": (0.0, 1.0)}


def make_images(folder: Path, num_train: int, num_val: int, seed: int = 0) -> None:
    """Write ``folder/train/CLASS/*.jpg`` and ``folder/val/CLASS/*.jpg``.

    Args:
        folder: Made if it is missing.
        num_train: Images of each class to train on.
        num_val: Images of each class to validate on.
        seed: Of colours, widths, phases and noise.
    """
    random = np.random.default_rng(seed)
    for part, num in (("train", num_train), ("val", num_val)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for index in range(num):
                Image.fromarray(_stripes(name, random)).save(folder / part / name / f"{index:04d}.jpg", quality=90)


def _stripes(name: str, random: np.random.Generator) -> np.ndarray:
    """One image, uint8 ``[SIZE, SIZE, 3]``."""
    row, column = np.mgrid[:SIZE, :SIZE]
    down, right = _NORMALS[name]
    wave = np.sin((down * row + right * column) * random.uniform(0.3, 0.9) + random.uniform(0, 6.3))
    first, second = random.uniform(0, 255, (2, 3))
    image = np.where(wave[..., None] > 0, first, second) + random.normal(0, 25, (SIZE, SIZE, 3))
    return image.clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=200, help="images of each class to train on")
    parser.add_argument("--val", type=int, default=40, help="images of each class to validate on")
    arguments = parser.parse_args()
    make_images(arguments.folder, arguments.train, arguments.val)
    print(f"{arguments.folder}: {len(CLASSES)} classes, {arguments.train} + {arguments.val} images of each")
