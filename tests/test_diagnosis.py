"""The first pieces of diagnosis: average gradient, first non-finite layer, batches that hold NaN."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from pws._errors import PwsError
from pws._preserve import random_state
from pws.diagnosis import average_gradient_ratio, first_non_finite
from pws.training import OptimConfig
from pws.training.classifier import Classifier
from pws.training.data import ImageData
from pws.training.recipe import DataConfig


def test_average_gradient_ratio_at_its_ends() -> None:
    alike, opposed, single = torch.full((6,), -2.0), torch.tensor([1.0, -1] * 3), torch.eye(6)[2]
    ratio = average_gradient_ratio(torch.stack([alike, opposed, single, torch.zeros(6)]).view(4, 2, 3))
    assert ratio.tolist() == pytest.approx([1.0, 0.0, 1 / 6, 0.0])


def test_average_gradient_ratio_of_independent_gradients_is_one_over_n() -> None:
    ratio = average_gradient_ratio(torch.randn(20_000, 25))
    # The ratio is a squared cosine with the ones direction: Beta(1/2, 12), of mean 1/25 and deviation 0.054 a filter.
    assert float(ratio.mean()) * 25 == pytest.approx(1, abs=5 * 0.054 * 25 / 20_000**0.5)


def test_first_non_finite_in_execution_order() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.middle(self.first(x)))
            return out

    model = Backwards()
    assert first_non_finite(model, torch.ones(1, 2)) is None
    with torch.no_grad():
        model.middle.weight[0, 0] = torch.inf
    assert first_non_finite(model, torch.ones(1, 2)) == "middle"
    assert not model.middle._forward_hooks


def test_a_parametrized_layer_is_named_itself() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.ReLU())
    with torch.no_grad():
        model[0].parametrizations.weight.original0.fill_(torch.inf)
    assert first_non_finite(model, torch.ones(1, 2)) == "0"


def test_a_batch_that_holds_nan() -> None:
    class Broken(ImageData):
        def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], _: int) -> tuple[Tensor, Tensor]:
            batch[0][3, 0, 2, 2] = torch.nan
            return batch

    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), OptimConfig(), 10)
    trainer = Trainer(
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        devices=1,
    )
    with pytest.raises(PwsError, match=r"batch of step 0 holds NaN or infinity in 1 of 32 images \(first: image 3"):
        trainer.fit(module, datamodule=Broken(DataConfig(batch_size=32), seed=0))


def test_a_random_mask_is_looked_at_again_as_it_was() -> None:
    """A dropout that hides a whole row makes NaN in one pass of many; the numbers go on as if nobody had looked."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.head(y.masked_fill(torch.rand_like(y) < 0.3, -torch.inf).softmax(-1))  # type: ignore[no-any-return]

    model, x = Masked(), torch.ones(4, 4)
    torch.manual_seed(0)
    rewind = random_state(model)
    while torch.isfinite(model(x)).all():
        rewind = random_state(model)
    after = torch.get_rng_state()
    for _ in range(3):
        assert first_non_finite(model, x, rewind) == "head"
        assert torch.equal(torch.get_rng_state(), after)
