"""Lightning's calls that save, load and remove checkpoints."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ssd.checkpoint.dictionary import MASTERS, NAMES, open_dictionary, with_masters
from lightning_ssd.convert.param_names import in_order_of
from lightning_ssd.errors import MissingCheckpointError, listed
from lightning_ssd.optim.dumped import Dumped, are_unchanged
from lightning_ssd.optim.whole import WholeOptimizer
from lightning_ssd.paths import home_path
from lightning_ssd.saving.link_staging import remove_checkpoint
from lightning_ssd.session.handover import Handover, take_masters
from lightning_ssd.session.session import Session
from lightning_ssd.store.mapped_safetensors import SeenFiles
from lightning_ssd.strategy import checkpoint_forms
from lightning_ssd.strategy.checkpoint_plugin import CheckpointPlugin
from lightning_ssd.strategy.guards import require_set
from lightning_ssd.strategy.lightning_classes import LightningModule
from lightning_ssd.strategy.resume import Resume
from lightning_ssd.strategy.trainer_parts import TrainerPartsMixin


class CheckpointMixin(TrainerPartsMixin):
    """Saves, loads and removes checkpoints of the session."""

    _namespace: str
    _session: Session | None
    _resume: Resume
    _handover: Handover
    _dumped: dict[Optimizer, Dumped]
    _opened: SeenFiles
    _given: dict[str, Any]
    _own_entries: dict[str, Any]  # of the checkpoint that was loaded, which hooks of the user do not see

    @property
    def session(self) -> Session:
        """The session of the Trainer's current or last run."""
        return require_set(self._session, "session")

    @property
    def _pl_module(self) -> LightningModule:
        """The user's module, once the Trainer has connected it."""
        return require_set(self.lightning_module, "module")

    @property
    def _checkpoint_plugin(self) -> CheckpointPlugin:
        return CheckpointPlugin(self._known_checkpoint_io, self._given["checkpoint"])

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: weights are restored before they are written to the store, where callbacks see them."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state dict with the parameters themselves in it, so that none is read.

        If the module overrides ``state_dict`` without ``keep_vars``, parameters are mapped.
        """
        try:
            return self._pl_module.state_dict(keep_vars=True)
        except TypeError:
            return self._pl_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, with tensors mapped from the store."""
        inner = getattr(optimizer, "_optimizer", optimizer)
        state = cast(dict[str, Any], inner.state_dict())
        # A hook on ``state_dict`` may have changed it: then the store does not have these values.
        adopted = None if self._session is None else self._session.adopted(inner)
        if adopted is None or not adopted.is_hooked:
            self._dumped[inner] = Dumped(state)
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a checkpoint in the form that ``checkpoint`` says; what only the plugin can write, the plugin writes."""
        if self._session is None or not self._session.units:  # the dictionary has all values
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if self._handover.is_pending and "optimizer_states" in checkpoint:
            with self.session.written_back():
                self._handover.move_into(self.session, self.optimizers)
        whole = {**checkpoint, **self._resume.state(self._pl_module.trainer)}
        dumped, self._dumped = [self._dumped.get(optimizer) for optimizer in self.optimizers], {}
        is_linked = are_unchanged(dumped, checkpoint.get("optimizer_states"))
        plugin = self._checkpoint_plugin
        if plugin.writes(filepath, storage_options, saves_files=self.session.sizing.saves_files):
            content = checkpoint_forms.mapped(self.session, whole, is_linked=is_linked)
            self.checkpoint_io.save_checkpoint(content, filepath, storage_options=storage_options)
        else:
            checkpoint_forms.save(self.session, whole, home_path(filepath, "checkpoint"), is_linked=is_linked)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a checkpoint; tensors are mapped, not read."""
        if self._checkpoint_plugin.reads(checkpoint_path):
            options = {} if weights_only is None else {"weights_only": weights_only}  # not in Lightning 2.5
            checkpoint, self._opened = super().load_checkpoint(checkpoint_path, **options), SeenFiles({})
        else:
            path = home_path(checkpoint_path, "ckpt_path")
            if not os.path.lexists(path):
                raise MissingCheckpointError(f"Checkpoint file not found: {path}; name one that is there")
            checkpoint, self._opened = open_dictionary(path, weights_only)
        self._own_entries = {key: checkpoint.pop(key) for key in (NAMES, MASTERS) if key in checkpoint}
        # A checkpoint that is loaded after `Session.place` is one that a Tuner saved.
        session, module = self._session, self.lightning_module
        is_fit = module is not None and module._trainer is not None and module._trainer.state.fn == "fit"
        self._resume.take(checkpoint, is_resumed=is_fit and session is not None and not session.units)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights before they are written to the store; meta parameters become the mapped tensors themselves."""
        if self._session is None:  # called by the user before a run
            super().load_model_state_dict(checkpoint, strict)
            return
        if self.session.settings.param_dtype == torch.float64:
            # Lightning converts the module after its weights are loaded: they would be rounded to float32 first.
            self.session.materializer.widen(self._pl_module, torch.float64)
            self.precision_plugin.convert_module(self._pl_module)
        weights = with_masters(self._pl_module, checkpoint["state_dict"], self._own_entries.get(MASTERS, {}))
        try:
            self.session.materializer.load(self._pl_module, weights, strict=strict)
        except RuntimeError:  # of torch, about all keys; a file that changed meanwhile is the likelier cause
            self._opened.require_unchanged()
            raise

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Write optimizer state and float32 masters to the store."""
        if self._session is None:  # called by the user before a run
            super().load_optimizer_state_dict(checkpoint)
            return
        states = checkpoint["optimizer_states"]
        if len(states) != len(self.optimizers):
            warnings.warn(
                f"the checkpoint has the state of {len(states)} optimizer(s), configure_optimizers made "
                f"{len(self.optimizers)}: as in plain Lightning the first ones are paired, and others begin anew",
                stacklevel=2,
            )
        names = self._own_entries.get(NAMES, [])
        for number, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=False)):
            saved = names[number] if len(names) == len(states) else []
            optimizer.load_state_dict(self._by_name(optimizer, state, saved))
        # Float32 values of the checkpoint are the masters of a run whose parameters are 16-bit.
        full = {n: v for n, v in checkpoint["state_dict"].items() if isinstance(v, Tensor) and v.dtype == torch.float32}
        masters = full | self._own_entries.get(MASTERS, {})
        params = {name: p for unit in self.session.units for name, p in zip(unit.names, unit.params, strict=True)}
        changed = take_masters(self.session, {params[n]: value for n, value in masters.items() if n in params})
        self._opened.require_unchanged()
        if changed:
            logging.getLogger(f"{self._namespace}.ssd_offload").info(
                f"the values of {listed(changed)} are not what the checkpoint's float32 masters round to: a hook, "
                "callback or conversion has changed them; where they differ, training continues from the values"
            )

    def _by_name(self, optimizer: Optimizer, state: dict[str, Any], saved: list[list[str]]) -> dict[str, Any]:
        """``state`` in the order of the optimizer's groups now; unchanged if there are no names to match by."""
        adopted = self.session.adopted(optimizer)
        # If a hook of the user has changed the groups, the state is matched by position, as in torch.
        sizes = [len(group["params"]) for group in state.get("param_groups", ())]  # some classes save no groups
        is_as_saved = [len(names) for names in saved] == sizes
        if adopted is None or isinstance(adopted, WholeOptimizer) or not saved or not is_as_saved:
            return state
        where = f"optimizer {type(optimizer).__name__}"
        arranged, notes = in_order_of(state, saved, adopted.shapes_by_name(), where)
        if notes:
            warnings.warn(
                f"{where} has other parameters than when the checkpoint was saved. {'. '.join(notes)}", stacklevel=2
            )
        return arranged

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, of ours with its links."""
        recycle = None if self._session is None else self._session.store.recycle
        if self._checkpoint_plugin.reads(filepath) or not remove_checkpoint(home_path(filepath, "checkpoint"), recycle):
            super().remove_checkpoint(filepath)
