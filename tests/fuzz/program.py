"""What a fuzzed program is: a small data structure drawn from a seed, printed as the Python that makes it again."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.fuzz.blocks import BLOCKS
from tests.fuzz.features import FEATURES
from tests.fuzz.optimizers import OPTIMIZERS
from tests.fuzz.teachers import TEACHERS

TEACHER_WHENS = ("step_start", "step_end", "batch_end", "before_zero_grad", "epoch_end", "validation_start")
MANUALS = (
    *("one", "two_optimizers", "alternate", "same_parameters", "two_backwards", "two_losses", "accumulate", "clip"),
    *("closure", "edit_grads", "toggle", "no_zero_grad"),
)
SETUPS = ("init_in_configure", "read_in_configure", "anchors_in_configure", "load_in_configure", "init_on_fit_start")


@dataclass(frozen=True)
class Program:
    """One program. Each field's default is the least; a shrinker goes there.

    Attributes:
        seed: Of weights, data and everything that is random while it runs.
        width: Of the model.
        blocks: Names in `BLOCKS`.
        container: What holds the blocks.
        carry: What the forward hands from block to block beside ``x``.
        embed: What makes the input: a table, a table with ``max_norm``, a Linear.
        tie: Which parameters are one.
        frozen: Indices of blocks without gradient.
        loops: How often the blocks run in a forward.
        layer_drop: Blocks are left out at random.
        own: Parameters directly on the LightningModule.
        teacher: How a teacher follows, of `TEACHERS`.
        teacher_when: When it does.
        teacher_of: What it follows.
        features: Of `FEATURES`.
        setup: What is done to values before the first step.
        optimizer: Of `OPTIMIZERS`.
        groups: How parameters are grouped.
        schedule: Learning rates.
        manual: Of `MANUALS`, or automatic.
        accumulate: Batches per step.
        clip: How gradients are clipped.
        precision: Lightning's word; ``"bf16-true"`` without master.
        validation: When it runs.
        steps: Optimizer steps.
        resume_at: Save after this step and go on in a new Trainer; 0 for not.
        memory: ``host_memory``; ``"+8"`` is the smallest that works and 8 KiB.
        activations: The strategy's, and so on.
    """

    seed: int
    width: int = 8
    blocks: tuple[str, ...] = ("Block",)
    container: str = "list"
    carry: str = "none"
    embed: str = "table"
    tie: str = "none"
    frozen: tuple[int, ...] = ()
    loops: int = 1
    layer_drop: bool = False
    own: bool = False
    teacher: str = "none"
    teacher_when: str = "step_start"
    teacher_of: str = "net"
    features: tuple[str, ...] = ()
    setup: str = "none"
    optimizer: str = "adamw"
    groups: str = "one"
    schedule: str = "none"
    manual: str = "none"
    accumulate: int = 1
    clip: str = "none"
    precision: str = "32-true"
    validation: str = "none"
    steps: int = 3
    resume_at: int = 0
    memory: str = "min"
    activations: str = "auto"
    overlap: str = "auto"
    min_unit_numel: int = 0
    window: Any = "auto"

    def __str__(self) -> str:
        fields = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
        return f"Program({', '.join(f'{name}={value!r}' for name, value, default in fields if value != default)})"

    @property
    def holds_several(self) -> bool:
        """Whether code outside of modules holds parameters of several units at once."""
        return self.teacher != "none" or bool(HOLDING & set(self.features))

    @property
    def writes_between(self) -> bool:
        """Whether something writes between forward and backward; Lightning calls `on_before_zero_grad` there."""
        is_teacher_hook = self.teacher != "none" and self.teacher_when == "before_zero_grad"
        return is_teacher_hook or bool({"write_between", "write_before_zero_grad"} & set(self.features))

    def habits(self) -> list[dict[str, Any]]:
        """Every field that is not at its least, by itself."""
        return [
            {field.name: getattr(self, field.name)}
            for field in dataclasses.fields(self)
            if field.name != "seed" and getattr(self, field.name) != field.default
        ]

    def smaller(self) -> Iterator[Program]:
        """Programs with less, the largest cuts first: one habit alone, without one habit, a part of a habit."""
        habits = self.habits()
        if len(habits) > 2:
            yield from (Program(self.seed, **habit) for habit in habits)
        for habit in habits:
            (name,) = habit
            default = next(field.default for field in dataclasses.fields(self) if field.name == name)
            yield dataclasses.replace(self, **{name: default})
        for name in ("blocks", "features", "frozen"):
            values = getattr(self, name)
            for i in range(len(values)):
                if len(values) > 1:
                    yield dataclasses.replace(self, **{name: values[:i] + values[i + 1 :]})
                if name == "blocks" and values[i] != "Block":
                    yield dataclasses.replace(self, blocks=(*values[:i], "Block", *values[i + 1 :]))


def draw(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(f"program {seed} 0")

    def often(plain: Any, *others: Any, share: float = 0.4) -> Any:
        return rng.choice(others) if rng.random() < share else plain

    likes = rng.random() < 0.4  # a model of like blocks, as most are
    names = sorted(BLOCKS)
    blocks = (rng.choice(names),) * rng.randint(2, 5) if likes else tuple(rng.choices(names, k=rng.randint(1, 5)))
    manual = often("none", *MANUALS, share=0.25)
    steps = rng.randint(3, 6)
    wanted = rng.choice([0, 0, 1, 1, 2, 3])
    features = tuple(sorted(rng.sample(FEATURES, wanted)))
    program = Program(
        seed=seed,
        width=rng.choice([4, 8, 12, 16]),
        blocks=blocks,
        container=rng.choice(["list", "dict", "attributes", "sequential", "nested"]),
        carry=often("none", "list", "dict", "object", share=0.7 if {"Cache", "Push", "Pop"} & set(blocks) else 0.1),
        embed=often("table", "max_norm", "linear", share=0.3),
        tie=often("none", "head", "functional", "blocks", "norms", share=0.3),
        frozen=tuple(sorted(rng.sample(range(len(blocks)), rng.randint(0, len(blocks) // 2))))
        if rng.random() < 0.3
        else (),
        loops=often(1, 2, share=0.15),
        layer_drop=rng.random() < 0.1,
        own=rng.random() < 0.3,
        teacher=often("none", *TEACHERS, share=0.3),
        teacher_when=rng.choice(TEACHER_WHENS),
        teacher_of=rng.choice(["net", "blocks"]),
        features=features,
        setup=often("none", *SETUPS, share=0.15),
        optimizer=often("adamw", *OPTIMIZERS, share=0.7),
        groups=often("one", "decay", "each", share=0.4),
        schedule=often("none", "step", "epoch", "lambda", "onecycle", "plateau", share=0.4),
        manual=manual,
        accumulate=often(1, 2, 3, share=0.25),
        clip=often("none", "norm", "value", share=0.3),
        precision=often("32-true", "bf16-mixed", "bf16-true", share=0.3),
        validation=often("none", "every_2", "epoch", "sanity", share=0.4),
        steps=steps,
        resume_at=rng.randint(1, steps - 1) if rng.random() < 0.2 else 0,
        memory=rng.choice(["min", "min", "+0", "+8", "+32", "+128", "auto"]),
        activations=rng.choice(["auto", "auto", "keep", "recompute"]),
        overlap=often("auto", "off", share=0.25),
        min_unit_numel=often(0, 100, 1_000_000, share=0.5),
        window=often("auto", 1, 2, share=0.2),
    )
    return possible(program)


def possible(program: Program) -> Program:
    """The same without what plain Lightning, or torch, has no room for."""
    changes: dict[str, Any] = {}
    blocks, features = list(program.blocks), set(program.features)

    def instead(other: str, *names: str) -> None:
        blocks[:] = [other if block in names else block for block in blocks]

    if program.manual != "none":  # Lightning refuses these, or leaves them to the user
        changes |= {"accumulate": 1, "clip": "none", "schedule": "none"}
        features -= {"skip_step", "edit_grads"}
    if program.optimizer == "fused_adamw" and program.manual == "clip":
        changes["manual"] = "one"
    elif program.clip == "value":  # torch clips no empty list
        features -= {"skip_step"}
    if program.schedule == "plateau" and program.manual == "none" and program.validation == "none":
        changes["validation"] = "epoch"
    if program.schedule == "onecycle" and program.manual == "none" and program.optimizer in WITHOUT_MOMENTUM:
        changes["schedule"] = "step"
    if program.precision != "32-true":
        instead("Block", "Complex")
    if program.precision == "bf16-true":  # what torch does not have in bfloat16
        instead("Block", "SpectralNorm")
        features -= {"prune"}
    if program.optimizer == "fused_adamw":  # Lightning clips none that is fused
        changes["clip"] = "none"
    if program.optimizer == "adafactor":  # divides by the number of elements
        instead("Block", "Empty")
    if program.loops > 1 or program.tie == "blocks" or program.manual in SEVERAL or features & SEVERAL:
        # autograd refuses a weight that a second forward writes before the backward of the first
        instead("ClampsData", "ClampsWithoutGrad")
        instead("Positions", "MaxNorm")
        changes["embed"] = program.embed.replace("max_norm", "table")
    if features & {"input_grad", "func_grad", "func_grad_gathered"}:
        instead("Block", *WITHOUT_FUNCTION)
    if features & {
        "functional_call",
        "func_grad",
        "func_grad_gathered",
    }:  # torch puts back the wrong values of a module with two names
        instead("Block", "Shared")
        changes["tie"] = program.tie.replace("norms", "none")
    writes_shared = program.tie == "blocks" and {"ClampsData", "MaskedByHook"} & set(blocks)
    if writes_shared or program.writes_between:
        # A checkpoint of the user's own recomputes with the new weights in plain Lightning, a gradient of no function.
        # Under ours it may have kept what it computed with the old ones.
        instead("Block", "Checkpointed", "CheckpointedReentrant", "CheckpointedCall")
    if "autograd_grad" in features:
        instead("Checkpointed", "CheckpointedReentrant")
    if "inference_eval" in features:  # state of an inference is none for training
        instead("Block", *STATEFUL, "RunningBuffer")
    if "prune" in features and (program.teacher != "none" or features & COPYING):  # torch copies no pruned module
        features -= {"prune"}
    if "flat_penalty" in features:
        instead("Block", "Transposed")
    if program.resume_at:
        instead("Block", *STATEFUL)
        features -= {"memory_bank", "log_weights"}  # an epoch's mean begins again
        changes |= {"validation": "none", "setup": "none"}
        if program.schedule in ("plateau", "epoch"):
            changes["schedule"] = "step"
        if program.teacher_when == "epoch_end":  # Lightning does not run it again for an epoch that was saved before it
            changes["teacher_when"] = "batch_end"
        if program.manual in ("no_zero_grad", "alternate"):  # gradients that wait are in no checkpoint
            changes["manual"] = "one"
    if "Complex" in blocks:
        features -= {"clip_weights_batch_end"}
        changes["clip"] = changes.get("clip", program.clip).replace("value", "norm")
        changes["optimizer"] = "adamw" if program.optimizer in WITHOUT_COMPLEX else program.optimizer
    if program.teacher == "none":
        changes |= {"teacher_when": "step_start", "teacher_of": "net"}
    return dataclasses.replace(program, **(changes | {"blocks": tuple(blocks), "features": tuple(sorted(features))}))


STATEFUL = ("OwnGenerator", "Counter", "RunningAttribute", "Memory")  # state that no checkpoint has
HOLDING = {
    *("swap_in_step", "snapshot_restore", "func_grad", "functional_call", "foreach_norm", "stacked_norms"),
    "func_grad_gathered",
    *("pair_penalty", "product_penalty", "norm_diff", "flat_penalty", "assign_pair"),
}
COPYING = {"deepcopy", "deepcopy_callback", "frozen_critic"}
# Programs with more than one forward in a step.
SEVERAL = {
    *("two_losses", "alternate", "closure", "two_backwards", "same_parameters", "two_optimizers", "toggle"),
    *("two_forwards", "input_grad", "functional_call", "frozen_critic", "func_grad"),
    "func_grad_gathered",
}
# Without a second derivative, or with state or hooks that torch.func refuses.
WITHOUT_FUNCTION = (
    *("CheckpointedReentrant", "Recurrent", "CustomFunction", "Encoder", "Attention", "Mapped", "Checkpointed"),
    *("CheckpointedCall", "ActNorm", "OwnGenerator", "Counter", "RunningAttribute", "RunningBuffer", "Memory"),
    *("BatchNorm", "SpectralNorm", "Routed", "Hooked", "ClampsData", "MaskedByHook"),
)
WITHOUT_MOMENTUM = ("adadelta", "adagrad", "adafactor", "rprop", "asgd", "sign", "counting", "sgd", "centered")
WITHOUT_COMPLEX = ("adafactor", "rprop", "fused_adamw", "sign", "counting", "adadelta", "asgd")
