"""A training loop for networks that must learn in a minute: Muon for the matrices, AdamW for the rest.

Muon steps along the nearest orthogonal matrix to the momentum (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon/). At this size it needs about half the steps of AdamW. torch has its
own from 2.9 on; this one is here because older versions are supported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

Batch = TypeVar("Batch")
Progress = Callable[[int, int], None]  # (steps done, steps in all)

ADAM_RATE = 1e-3
WARM_UP = 0.1  # of the steps; then the rates fall along a cosine to zero
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised, for parameters of two dimensions."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` has no effect."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(buffer, group["momentum"]))
                scale = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Roughly the nearest semi-orthogonal matrix (R, C), by five Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    result: torch.Tensor = x.T if tall else x
    return result


def fit(
    module: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Batch], torch.Tensor],
    *,
    steps: int,
    muon_rate: float,
    progress: Progress,
) -> None:
    """Train all of `module` in place, one step for each of `steps` batches, and leave it in evaluation mode."""
    named = list(module.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim != 2 or "embed" in name]
    optimizers = [Muon(matrices, muon_rate), torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.98))]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, steps)) for o in optimizers]
    module.train()
    for done, batch in enumerate(batches, start=1):
        module.zero_grad()
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        progress(done, steps)
    module.eval()


def _rate(step: int, steps: int) -> float:
    """The share of the highest rate at a step: a ramp, then half a cosine."""
    done = (step + 1) / (steps + 1)
    return done / WARM_UP if done < WARM_UP else 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))
