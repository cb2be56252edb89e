"""One form of batch for everything that runs a model: what a DataLoader gives, and what models and losses return."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import pws
from pws._batch import batch_of, example_of, total

X, Y = torch.randn(6, 3, 8, 8), torch.randn(6)
MASK = torch.zeros(6, 4)
IMAGES = [torch.rand(3, 64, 72), torch.rand(3, 72, 64)]
BOXES = [
    {"boxes": torch.tensor([[2.0, 3.0, 40.0, 50.0]]), "labels": torch.tensor([1])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},  # an image without boxes
]


class Seen:
    """A model that returns what it was called with."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


one = Seen(lambda x: ("x", x))
two = Seen(lambda x, mask: ("x mask", x, mask))
optional = Seen(lambda x, mask=None: ("x mask", x, mask))
detector = Seen(lambda images, targets=None: ("images targets", images, targets))
listed = Seen(lambda images: ("images", images))
labelled = Seen(lambda pixel_values, labels=None: ("pixel_values labels", pixel_values, labels))


@pytest.mark.parametrize(
    ("model", "given", "called"),
    [
        (one, X, ("x", X)),
        (one, (X,), ("x", X)),
        (one, [X], ("x", X)),
        (one, (X, Y), ("x", X)),
        (one, [X, Y], ("x", X)),
        (one, ((X,), Y), ("x", X)),
        (two, ((X, MASK), Y), ("x mask", X, MASK)),
        (two, [[X, MASK], Y], ("x mask", X, MASK)),
        (two, ({"mask": MASK, "x": X}, Y), ("x mask", X, MASK)),
        (optional, ((X, MASK), Y), ("x mask", X, MASK)),
        (optional, (X, Y), ("x mask", X, None)),
        (detector, (IMAGES, BOXES), ("images targets", IMAGES, BOXES)),
        (detector, (tuple(IMAGES), tuple(BOXES)), ("images targets", tuple(IMAGES), tuple(BOXES))),
        (detector, (tuple(IMAGES[:1]), tuple(BOXES[:1])), ("images targets", tuple(IMAGES[:1]), tuple(BOXES[:1]))),
        (detector, (IMAGES[:1], BOXES[:1]), ("images targets", IMAGES[:1], BOXES[:1])),
        (listed, (IMAGES, BOXES), ("images", IMAGES)),
        (labelled, {"pixel_values": X, "labels": Y}, ("pixel_values labels", X, Y)),
        (labelled, ({"pixel_values": X}, Y), ("pixel_values labels", X, Y)),
        (labelled, (X, Y), ("pixel_values labels", X, Y)),
    ],
)
def test_what_a_model_is_called_with(model: Seen, given: Any, called: tuple[Any, ...]) -> None:
    found = batch_of(given).outputs(model)
    assert len(found) == len(called)
    assert all(a is b or a == b for a, b in zip(found, called, strict=True))


@pytest.mark.parametrize(
    ("model", "given", "called"),
    [
        (one, X, ("x", X)),
        (one, [X, Y], ("x", X)),
        (two, (X, MASK), ("x mask", X, MASK)),
        (optional, (X, MASK), ("x mask", X, MASK)),
        (detector, (IMAGES, BOXES), ("images targets", IMAGES, BOXES)),
        (detector, [IMAGES, BOXES], ("images targets", IMAGES, BOXES)),
        (detector, IMAGES, ("images targets", IMAGES, None)),
        (detector, IMAGES[:1], ("images targets", IMAGES[:1], None)),
        (listed, [*IMAGES, IMAGES[0]], ("images", [*IMAGES, IMAGES[0]])),
        (labelled, {"pixel_values": X, "labels": Y}, ("pixel_values labels", X, Y)),
    ],
)
def test_an_example_without_a_loss(model: Seen, given: Any, called: tuple[Any, ...]) -> None:
    found = example_of(model, given).outputs(model)
    assert all(a is b or a == b for a, b in zip(found, called, strict=True))


class Pairs(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Samples of a triple, which no rule can tell apart."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return X[i], MASK[i], Y[i]


def test_what_is_odd_has_its_forward() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.mask = nn.Linear(192, 1), nn.Linear(4, 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (self.image(x.flatten(1)) + self.mask(mask)).flatten()

    model, batches = Masked(), [*DataLoader(Pairs(), batch_size=3)]
    with pytest.raises(pws.PwsError, match=r"got list of 3.*pass forward="):
        pws.diagnose(model, batches[0], F.mse_loss)
    settings: dict[str, Any] = {
        "loss": lambda outputs, batch: F.mse_loss(outputs, batch[2]),
        "forward": lambda model, batch: model(batch[0], batch[1]),
    }
    usual = [((x, mask), y) for x, mask, y in batches]
    assert pws.diagnose(model, batches[0], **settings).loss == pws.diagnose(model, usual[0], F.mse_loss).loss
    assert pws.forecast(model, batches, **settings) == pws.forecast(model, usual, F.mse_loss)


@dataclass
class Output:
    """As Hugging Face's models return it."""

    loss: Tensor | None
    logits: Tensor


a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (a, 2.0),
        ({"a": a, "b": b}, 5.0),
        ({"a": [a, a], "b": b}, 7.0),
        ({"a": a, "accuracy": torch.tensor(0.5)}, 2.0),
        ({"loss": a, "part": b}, 2.0),
        ({"total_loss": a + b, "a": a, "b": b}, 5.0),
        ({"loss": {"a": a, "b": b}}, 5.0),
        (Output(a, X), 2.0),
    ],
)
def test_a_loss_as_it_comes(given: Any, expected: float) -> None:
    assert float(total(given).detach()) == expected


def regression() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))


class Own(nn.Module):
    """A model that computes its loss itself, as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = regression(), how

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.net(x)
        loss = F.mse_loss(logits, labels)
        return {
            "scalar": loss,
            "dict of losses": {"half": loss / 2, "other half": loss / 2},
            "dict with logits": {"loss": loss, "logits": logits},
            "object": Output(loss, logits),
        }[self.how]


@pytest.mark.parametrize("how", ["scalar", "dict of losses", "dict with logits", "object"])
def test_models_that_return_their_losses(how: str) -> None:
    batches = [(X, Y), (X.flip(0), Y)]
    expected = pws.diagnose(regression(), batches[0], F.mse_loss)
    found = pws.diagnose(Own(how), batches[0])
    assert found.loss == pytest.approx(expected.loss)
    assert [layer.critical_lr for layer in found.layers] == pytest.approx(
        [layer.critical_lr for layer in expected.layers], rel=1e-4
    )
    # Where there are losses alone, the last layer's outputs are looked at, which are the same here.
    rate = pws.forecast(regression(), batches, F.mse_loss).diverging_lr
    assert pws.forecast(Own(how), batches).diverging_lr == pytest.approx(rate, rel=1e-3)
    assert 0 < rate < math.inf


def test_one_number_a_sample_is_a_column() -> None:
    batches = [(X, Y), (X.flip(0), Y)]
    column = nn.Sequential(*list(regression())[:-1])
    expected = pws.forecast(column, batches, lambda outputs, y: F.mse_loss(outputs[:, 0], y))
    assert pws.forecast(regression(), batches, F.mse_loss) == expected


def test_a_loss_of_one_argument_leaves_the_targets() -> None:
    found = pws.diagnose(regression(), (X, Y), lambda outputs: outputs.square().mean())
    assert found.loss == pytest.approx(float(regression()(X).detach().square().mean()))


@pytest.mark.parametrize("loss", [None, lambda losses: losses, lambda losses, _: sum(losses.values())])
def test_a_detector(loss: Callable[..., Any] | None) -> None:
    torch.manual_seed(0)
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    found = pws.diagnose(model, (IMAGES, BOXES), loss)
    assert found.loss == pytest.approx(float(sum(model(IMAGES, BOXES).values())), rel=1e-4)
    assert all(layer.gradient is not None for layer in found.layers)


# --- What is not finite, or empty ---


def masked_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets)[~targets.isnan()].square().mean()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores, self.values = nn.Linear(192, 4), nn.Linear(192, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return ((self.scores(x.flatten(1)) + mask).softmax(-1) * self.values(x.flatten(1))).sum(-1)


HOLED = torch.where(Y > 0, torch.nan, Y)
CAUSAL = MASK.clone().index_fill_(1, torch.tensor([1, 3]), -math.inf)
FINE: dict[str, tuple[Callable[[], nn.Module], Any, Callable[..., Any]]] = {
    "targets of NaN that the loss leaves out": (regression, (X, HOLED), masked_loss),
    "a mask of minus infinity": (Attention, ((X, CAUSAL), Y), F.mse_loss),
    "an image without boxes": (regression, ((X,), [{"boxes": torch.zeros(0, 4)}]), lambda out, _: out.square().mean()),
}


@pytest.mark.parametrize("case", FINE)
def test_what_does_not_reach_the_loss_is_fine(case: str) -> None:
    build, batch, loss = FINE[case]
    torch.manual_seed(0)
    model, parsed = build(), batch_of(batch)
    expected = float(parsed.loss(loss, parsed.outputs(model)).detach())
    assert pws.diagnose(model, batch, loss).loss == pytest.approx(expected)
    assert 0 < pws.forecast(model, [batch, batch], loss).diverging_lr < math.inf


@pytest.mark.parametrize(
    ("batch", "loss", "words"),
    [
        ((X, HOLED), F.mse_loss, "target must be finite; got"),
        ((X * math.nan, Y), F.mse_loss, "input must be finite; got 1,152 NaN"),
        ((X[:0], Y[:0]), F.mse_loss, r"at least one sample; got an input of shape \(0, 3, 8, 8\)"),
    ],
)
def test_what_reaches_it_is_refused(batch: Any, loss: Callable[..., Any], words: str) -> None:
    for run in (pws.diagnose, lambda model, batch, loss: pws.forecast(model, [(X, Y), batch], loss)):
        with pytest.raises(pws.PwsError, match=words):
            run(regression(), batch, loss)


def test_weights_that_overflow_are_not_blamed_on_a_mask() -> None:
    model = Attention()
    nn.init.constant_(model.values.weight, math.inf)
    assert pws.diagnose(model, ((X, CAUSAL), Y), F.mse_loss).verdict.cause == "non-finite weight"
