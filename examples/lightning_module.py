"""PWS in a Lightning module: return an optimizer of pws.optim from `configure_optimizers`. Nothing else changes."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pws

lightning.seed_everything(0, verbose=False)

# 1,797 images of handwritten digits, 8 x 8 pixels. Every fifth is for testing.
digits = load_digits()
images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] - 4.9) / 6
labels = torch.tensor(digits.target)
test = torch.arange(len(labels)) % 5 == 0
train_loader = DataLoader(TensorDataset(images[~test], labels[~test]), batch_size=64, shuffle=True, drop_last=True)
test_loader = DataLoader(TensorDataset(images[test], labels[test]), batch_size=360)

# Any model with BatchNorm will do. `convert` returns a copy without it, scaled on one batch of the data.
with_batch_norm = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
)
network = pws.convert(with_batch_norm, images[:64])


class Digits(lightning.LightningModule):
    """Trains the network, and logs its accuracy."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Log the accuracy on the test images."""
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that keeps the marked layers of this module standardized."""
        return pws.optim.SGD(self, lr=0.1, momentum=0.9, weight_decay=5e-4)


trainer = lightning.Trainer(max_epochs=5, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
trainer.fit(Digits(), train_loader, test_loader)
print(f"test accuracy {100 * float(trainer.callback_metrics['accuracy']):.1f} %")
