"""What the tests of diagnosis share: small networks, batches, and what a diagnosis must leave as it was."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from pws.diagnosis import Diagnosis

cross_entropy = nn.functional.cross_entropy
X = torch.ones(8, 3)


def small_net(conv: Callable[..., nn.Module] = nn.Conv2d, head: Callable[..., nn.Module] = nn.Linear) -> nn.Sequential:
    return nn.Sequential(
        *(conv(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(conv(4, 6, 3), nn.ReLU(), nn.Flatten(), head(96, 5)),
    )


def images(samples: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 1, 8, 8) + 0.5, torch.arange(samples) % 5


def square(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


def hooks(model: nn.Module) -> list[int]:
    """How many hooks of each kind every module and parameter has."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_always_called",
    )
    kinds += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    of_modules = [len(getattr(module, kind)) for module in model.modules() for kind in kinds]
    return of_modules + [
        len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()
    ]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a diagnosis must not change, to compare with `==`."""
    return {
        "parameters": [(id(p), p._version, p.tolist(), p.requires_grad) for p in model.parameters()],
        "gradients": [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        "buffers": {name: (id(b), b.tolist()) for name, b in model.named_buffers()},
        "modes": [module.training for module in model.modules()],
        "hooks": hooks(model),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),
        "modes of torch": (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.overrides._get_current_function_mode(),
        ),
    }


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, image: Tensor, mask: Tensor, *, flag: bool = False) -> dict[str, Tensor]:
        return {"out": self.a(image) + self.b(mask), "extra": mask}


def deterministic() -> nn.Sequential:
    model = small_net()
    model[3] = nn.Identity()
    return model


def rendered(diagnosis: Diagnosis, width: int = 250) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(diagnosis.table())
    return file.getvalue()
