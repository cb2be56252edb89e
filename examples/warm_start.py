"""A trained model loses its BatchNorm and keeps what it has learnt: `warm_start=True` fits each layer to its old outputs."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import Optimizer

import pws

torch.manual_seed(0)

# 1,797 images of handwritten digits, 8 x 8 pixels. Every fifth is for testing.
digits = load_digits()
images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6
labels = torch.tensor(digits.target)
test = torch.arange(len(labels)) % 5 == 0


def train(model: nn.Module, optimizer: Optimizer, epochs: int) -> None:
    """Train on all but the test images."""
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(int((~test).sum())).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[~test][batch]), labels[~test][batch]).backward()
            optimizer.step()


def accuracy(model: nn.Module) -> str:
    """Return the accuracy on the test images, in percent."""
    with torch.no_grad():
        right = model.eval()(images[test]).argmax(1) == labels[test]
    return f"{100 * right.float().mean():.1f} %"


# The pretrained model: yours comes from a file or from timm.create_model(..., pretrained=True).
pretrained = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
)
train(pretrained, torch.optim.SGD(pretrained.parameters(), lr=0.1, momentum=0.9), epochs=4)
print(f"pretrained, with BatchNorm: test accuracy {accuracy(pretrained)}")

# Some hundred real images are enough to fit on; they need no labels.
plan = pws.plan(pretrained, images[~test][:512], warm_start=True)
converted = plan.apply()
print(plan)  # its last line says how far the outputs are from those of the pretrained model
print(f"converted, not trained yet: test accuracy {accuracy(converted)}")

# A short fine-tuning at a small learning rate takes most of the difference away.
train(converted, pws.optim.SGD(converted, lr=0.01, momentum=0.9), epochs=1)
print(f"fine-tuned for an epoch: test accuracy {accuracy(converted)}")
