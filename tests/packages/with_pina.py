"""pina-mathlab: differential equations; the loss has derivatives of the model by its inputs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pina.solver
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pina import Trainer
from pina.model import FeedForward
from pina.optim import TorchOptimizer
from pina.problem.zoo import Poisson2DSquareProblem

from tests.packages.job import Job, Trained

NAMESPACE = "lightning.pytorch"


def problem() -> Any:
    made = Poisson2DSquareProblem()
    made.discretise_domain(12, "random")
    return made


def train(name: str, optimizer: str, trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    return _fit(name, optimizer, trainer | {"max_epochs": epochs}, folder, None)


def resume(name: str, optimizer: str, trainer: dict[str, Any], folder: Path, epochs: int) -> Trained:
    return _fit(name, optimizer, trainer | {"max_epochs": epochs}, folder, folder / "epochs" / "epoch=1.ckpt")


def _fit(name: str, optimizer: str, trainer: dict[str, Any], folder: Path, checkpoint: Path | None) -> Trained:
    equation = problem()
    kind = getattr(pina.solver, name)
    model = FeedForward(input_dimensions=2, output_dimensions=1, inner_size=12, n_layers=3)
    given: dict[str, Any] = {"problem": equation, "model": model}
    if optimizer != "Adam":
        given["optimizer"] = TorchOptimizer(getattr(torch.optim, optimizer))
    solver = kind(**given)
    middle = ModelCheckpoint(folder / "epochs", "{epoch}", save_top_k=-1)
    trainer = trainer | {"callbacks": [*trainer["callbacks"], middle]}
    runner = Trainer(solver, batch_size=6, logger=False, **trainer)
    runner.train(ckpt_path=checkpoint, weights_only=False)
    runner.save_checkpoint(folder / "last.ckpt")
    again = kind.load_from_checkpoint(folder / "last.ckpt", weights_only=False, **given)
    points = equation.spatial_domain.sample(5, "grid")
    return Trained(solver, predict(solver, points), predict(again, points))


def predict(solver: Any, points: Any) -> torch.Tensor:
    return solver(points).detach().as_subclass(torch.Tensor).clone()


MODELS = {
    "PINN, Adam": ("PhysicsInformedSingleModelSolver", "Adam"),
    "PINN, LBFGS": ("PhysicsInformedSingleModelSolver", "LBFGS"),
    "SelfAdaptivePINN": ("SelfAdaptivePhysicsInformedSolver", "Adam"),
    "CompetitivePINN": ("CompetitivePhysicsInformedSolver", "Adam"),
    "GradientPINN": ("GradientPhysicsInformedSingleModelSolver", "Adam"),
    "RBAPINN": ("RBAPhysicsInformedSingleModelSolver", "Adam"),
}
JOBS = [
    Job(
        "pina-mathlab",
        name,
        "pina.Trainer.train",
        "load_from_checkpoint",
        partial(train, *given),
        partial(resume, *given),
    )
    for name, given in MODELS.items()
]
