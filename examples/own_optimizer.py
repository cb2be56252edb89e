"""An optimizer of your own trains standardized layers: `pws.optim.Wrapped` gives it the parameters behind the kernels."""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import pws

torch.manual_seed(0)

# 1,797 images of handwritten digits, 8 x 8 pixels. Every fifth is for testing.
digits = load_digits()
images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6
labels = torch.tensor(digits.target)
test = torch.arange(len(labels)) % 5 == 0


class Lion(torch.optim.Optimizer):
    """Steps by the sign of an average of the gradients (Chen et al., 2023). It knows nothing of pws."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move each parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    parameter.add_((0.9 * average + 0.1 * parameter.grad).sign(), alpha=-group["lr"])
                    average.lerp_(parameter.grad, 0.01)


with_batch_norm = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
)
model = pws.convert(with_batch_norm, images[:64])

# torch's own optimizers are wrapped in the same way: pws.optim.Wrapped(model, torch.optim.RMSprop, lr=0.01).
optimizer = pws.optim.Wrapped(model, Lion, lr=3e-3)

for _ in range(5):
    for batch in torch.randperm(int((~test).sum())).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[~test][batch]), labels[~test][batch]).backward()
        optimizer.step()

with torch.no_grad():
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
print(f"test accuracy {100 * accuracy:.1f} %")

# The filters stayed standardized: each has mean zero.
first = next(model.parameters()).detach().flatten(1)
print(f"largest mean of a filter of the first layer: {first.mean(1).abs().max():.0e}")
