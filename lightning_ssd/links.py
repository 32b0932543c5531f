"""What torch's unpickler calls for each tensor of a checkpoint in the form ``links``: the file names them, and a folder
beside it holds their bytes.

Torch imports this module with itself (`lightning_ssd._autoload`), so it imports nothing before it is called.
"""

from __future__ import annotations

import importlib
from typing import Any


def linked(links: Any, *place: Any) -> Any:
    """Open the folder of a checkpoint, or map one of its tensors.

    The name of this function is in every such file, and must not change.

    Args:
        links: The text that names the folder, or the folder that a call with this text returned.
        place: Path of a file in the folder, its bytes, the tensor's name in it, and perhaps the dtype to convert to.

    Returns:
        With a text the open folder; with a folder and a place a tensor, which lies in the mapped file; with a folder
        alone the checkpoint's id.

    Raises:
        CheckpointError: The folder is not there or another one, or a file in it is not as the place says.
    """
    folder = importlib.import_module("lightning_ssd.checkpoint.links").Links
    return folder(links) if isinstance(links, str) else folder.require(links).get(*place)
