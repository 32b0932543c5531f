"""Types of arguments that several commands take."""

from __future__ import annotations

import argparse
import os

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.paths import local_path


def path(text: str) -> str:
    """A local path; what the shell has left of ``~`` and ``$VAR`` is expanded, unless something has that very name."""
    if os.path.lexists(text):
        return text
    try:
        return local_path(text, "path")
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
