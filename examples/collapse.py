"""A network without normalization collapses at a large learning rate; with BatchNorm or PWS it trains. As `pws demo` shows."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import pws

EPOCHS, CHANCE, RATES = 5, 0.2, (0.05, 1.0)

# 1,797 images of handwritten digits, 8 x 8 pixels. Every fifth is for testing.
digits = load_digits()
images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6
labels = torch.tensor(digits.target)
test = torch.arange(len(labels)) % 5 == 0


def network() -> nn.Sequential:
    """Return eight convolutions, each followed by BatchNorm and a ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in [(1, 16, 1), *[(16, 16, 1)] * 2, (16, 32, 2), *[(32, 32, 1)] * 4]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        nn.init.kaiming_normal_(conv.weight)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def train(method: str, lr: float) -> str:
    """Return the test accuracy after training, or how the network collapsed."""
    torch.manual_seed(0)
    model: nn.Module = network()
    if method == "none":
        model = nn.Sequential(*(layer for layer in model.children() if not isinstance(layer, nn.BatchNorm2d)))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    if method == "pws":
        model = pws.convert(model, images[:64])
        optimizer = pws.optim.SGD(model, lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=EPOCHS * 23)  # down to 0
    for _ in range(EPOCHS):
        for batch in torch.randperm(int((~test).sum())).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[~test][batch]), labels[~test][batch])
            if not loss.isfinite():
                return "NaN"
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        accuracy = float((model.eval()(images[test]).argmax(1) == labels[test]).float().mean())
    return f"{100 * accuracy:.1f} %" if accuracy > CHANCE else "stuck"


print(f"{'method':8}" + "".join(f"{f'LR {lr:g}':>10}" for lr in RATES))
for method in ("none", "bn", "pws"):
    print(f"{method:8}" + "".join(f"{train(method, lr):>10}" for lr in RATES))
