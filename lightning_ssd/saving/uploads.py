"""Loggers that upload checkpoint files: they would take the small file of links alone, and need single files."""

from __future__ import annotations

from typing import Any, Literal

from lightning_ssd.errors import ConfigurationError

Form = Literal["auto", "file", "links"]

_FLAGS = ("_log_model", "_log_model_checkpoints")
"""Attributes by which loggers say whether they upload checkpoints: of W&B, MLflow, Lightning's own; of Neptune."""

_LIGHTNING = ("lightning.", "pytorch_lightning.", "lightning_fabric.")


def form_for_loggers(trainer: Any, checkpoint: Form) -> Form:
    """The option ``checkpoint``, or ``"file"`` in place of ``"auto"`` where a logger uploads checkpoints.

    A logger of the user's own that is told of each checkpoint, and does not say whether it uploads it, may read links.

    Args:
        trainer: The Trainer.
        checkpoint: The option.

    Raises:
        ConfigurationError: A logger says that it uploads files, and links are asked for.
    """
    told = [type(logger).__name__ for logger in trainer.loggers if _says_so(logger)]
    if told and checkpoint == "links":
        raise ConfigurationError(
            f"checkpoint='links' saves a small file and, beside it, a folder of links; {', '.join(told)} would upload "
            "the file alone: set checkpoint='file' (or 'auto'), or log_model=False"
        )
    uploads = bool(told) or any(map(_may_upload, trainer.loggers))
    return "file" if uploads and checkpoint == "auto" else checkpoint


def _says_so(logger: Any) -> bool:
    return any(bool(getattr(logger, flag, False)) for flag in _FLAGS)


def _may_upload(logger: Any) -> bool:
    hook = getattr(type(logger), "after_save_checkpoint", None)
    is_silent = not any(hasattr(logger, flag) for flag in _FLAGS)
    return is_silent and hook is not None and not hook.__module__.startswith(_LIGHTNING)
