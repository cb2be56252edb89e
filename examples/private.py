"""Differential privacy with Opacus: a pretrained model loses its BatchNorm, and learns from private images."""

import warnings

import torch
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pws.private import bound_steps, make_trainable

torch.manual_seed(0)
warnings.filterwarnings("ignore", message="Secure RNG|Full backward hook|Optimal order")  # of Opacus and its hooks

# Of 1,797 images of handwritten digits, 300 are public, 360 are for testing, and the others are private.
digits = load_digits()
images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6
labels = torch.tensor(digits.target)
test = torch.arange(len(labels)) % 5 == 0
public = ~test & (torch.arange(len(labels)) < 375)
private = ~test & ~public


def accuracy(model: nn.Module) -> str:
    """Return the accuracy on the test images, in percent."""
    with torch.no_grad():
        right = model.eval()(images[test]).argmax(1) == labels[test]
    return f"{100 * right.float().mean():.1f} %"


# The pretrained model: yours comes from a file or from timm.create_model(..., pretrained=True).
pretrained = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
    *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
)
optimizer = torch.optim.SGD(pretrained.parameters(), lr=0.1, momentum=0.9)
for _ in range(4):
    for batch in torch.randperm(int(public.sum())).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(pretrained(images[public][batch]), labels[public][batch]).backward()
        optimizer.step()
print(f"pretrained on public images, with BatchNorm: test accuracy {accuracy(pretrained)}")

# What is set from the images here is not accounted for: they must be public.
model = make_trainable(pretrained, images[public])
print(f"made trainable: test accuracy {accuracy(model)}")

engine = PrivacyEngine()
loader = DataLoader(TensorDataset(images[private], labels[private]), batch_size=128)
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model.train(),
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    data_loader=loader,
    target_epsilon=8.0,
    target_delta=1e-4,
    epochs=2,
    max_grad_norm=1.0,
)
bound_steps(model, optimizer)  # no layer moves further than this, however large the noise
for _ in range(2):
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
print(f"two epochs with epsilon {engine.get_epsilon(1e-4):.2f}: test accuracy {accuracy(model)}")
