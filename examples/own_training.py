"""Your own network and datasets, trained with a recipe: a run folder with checkpoints, metrics and a summary."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import pws
from pws.training import OptimConfig, Recipe, TrainerConfig, fit, weights

# 1,797 images of handwritten digits, 8 x 8 pixels. Every fifth is for testing.
digits = load_digits()
images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6
labels = torch.tensor(digits.target)
test = torch.arange(len(labels)) % 5 == 0

torch.manual_seed(0)
layers = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
network = pws.convert(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), images[~test][:64])

# A tenth of the training images tells the best epoch. An interrupted run goes on with resume=True.
recipe = Recipe(name="digits", optim=OptimConfig(lr=0.1), trainer=TrainerConfig(epochs=5, accelerator="cpu", devices=1))
train_data, test_data = TensorDataset(images[~test], labels[~test]), TensorDataset(images[test], labels[test])
summary = fit(network, train_data, test_data, recipe, "runs/digits")

network.load_state_dict(weights("runs/digits"))
accuracy = (network.eval()(images[test]).argmax(1) == labels[test]).float().mean()
print(f"test accuracy {100 * summary.metrics['accuracy']:.1f} %, of the network loaded again {100 * accuracy:.1f} %")
