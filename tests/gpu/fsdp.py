"""The same model by torch's FSDP2 with ``CPUOffloadPolicy``: float32 parameters and AdamW's moments in host memory."""

from __future__ import annotations

import itertools
import tempfile
import time
from typing import Any

from tests.gpu.device import IS_SIMULATED

import torch  # isort: skip
import torch.nn.functional as F  # isort: skip
from torch import distributed  # isort: skip
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard  # isort: skip

from tests.benchmarks.gpt import GPT, batches  # isort: skip
from tests.benchmarks.support import median  # isort: skip
from tests.gpu.profile import Profile  # isort: skip


def train_by_fsdp(job: Any) -> dict[str, Any]:
    """Train as `tests.gpu.worker.train` does; on the simulated device, which has no collectives, on the CPU."""
    device = torch.device("cpu" if IS_SIMULATED else "cuda")
    with tempfile.NamedTemporaryFile(dir=job.path) as file:
        backend = "gloo" if device.type == "cpu" else "nccl"
        distributed.init_process_group(backend, init_method=f"file://{file.name}.store", rank=0, world_size=1)
        try:
            return _train(job, device)
        finally:
            distributed.destroy_process_group()


def _train(job: Any, device: torch.device) -> dict[str, Any]:
    begin = time.perf_counter()
    model = _model(job, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    losses, begins, profile = [], [], None
    for step, (ids, targets) in enumerate(batches(job.steps, job.batch, job.seq)):
        torch.cuda.synchronize()
        begins.append(time.perf_counter())
        if step == job.steps - 3:
            profile = Profile()
        elif step == job.steps - 2 and profile is not None:
            profile.begin()
        elif step == job.steps - 1 and profile is not None:
            told = profile.end()
        logits = model(ids.to(device)).float()
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.to(device).view(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    steps = [b - a for a, b in itertools.pairwise(begins)][1 : job.steps - 3]
    found: dict[str, Any] = {"step_s": median(steps), "steps_s": steps, "losses": losses, "setup_s": begins[0] - begin}
    return found | ({"profile": told} if not IS_SIMULATED else {"ran_on": "cpu"})


def _model(job: Any, device: torch.device) -> GPT:
    mesh = distributed.init_device_mesh(device.type, (1,))
    model = GPT(job.size, seq=job.seq, recompute=True)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
        "offload_policy": CPUOffloadPolicy() if device.type == "cuda" else OffloadPolicy(),
    }
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)
