"""A model of timm loses its BatchNorm in one line, and trains with batches of 4 images."""

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

import pws

torch.manual_seed(0)

# 1,797 images of handwritten digits, enlarged to 32 x 32 pixels; the first 600 are for training.
digits = load_digits()
pixels = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6
images = nn.functional.interpolate(pixels, size=32, mode="bilinear")
labels = torch.tensor(digits.target)

model = timm.create_model("test_resnet", in_chans=1, num_classes=10)

# The plan says what happens to each layer and norm, and why. Read it before you convert a model of your own.
plan = pws.plan(model, images[:64])
print(plan)
model = plan.apply()  # the same as pws.convert(model, images[:64])

norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
print(f"norms left: {len(norms)}")

optimizer = pws.optim.SGD(model, lr=0.01, momentum=0.9, weight_decay=5e-4)
for _ in range(3):
    for batch in torch.randperm(600).split(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    accuracy = (model(images[600:1200]).argmax(1) == labels[600:1200]).float().mean()
print(f"test accuracy {100 * accuracy:.1f} % with batches of 4 images")
