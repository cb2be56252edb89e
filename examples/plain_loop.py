"""A network without BatchNorm in a plain training loop: mark its layers, and take an optimizer of pws.optim."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import pws

torch.manual_seed(0)

# 1,797 images of handwritten digits, 8 x 8 pixels, which come with scikit-learn. Every fifth is for testing.
digits = load_digits()
images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6  # mean 0, deviation 1
labels = torch.tensor(digits.target)
test = torch.arange(len(labels)) % 5 == 0


def conv(inputs: int, outputs: int, gain: str = "relu") -> nn.Module:
    """Return a convolution whose weight the optimizer keeps standardized; `gain` names the activation before it."""
    return pws.mark(nn.Conv2d(inputs, outputs, 3, padding=1), gain=gain, reset_parameters=True)


model = nn.Sequential(
    *(conv(1, 16, gain="linear"), nn.ReLU()),  # "linear": the image comes straight in
    *(conv(16, 32), nn.ReLU(), nn.MaxPool2d(2)),
    *(conv(32, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    pws.mark(nn.Linear(32, 10), reset_parameters=True),
)

# Pass the model, not model.parameters(): the optimizer must see which layers are marked.
optimizer = pws.optim.SGD(model, lr=0.1, momentum=0.9, weight_decay=5e-4)

for epoch in range(5):
    for batch in torch.randperm(int((~test).sum())).split(64):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[~test][batch]), labels[~test][batch])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {100 * accuracy:.1f} %")
