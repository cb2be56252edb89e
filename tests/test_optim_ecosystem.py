"""The optimizer form beside what people train with: compilers, checkpointing, averages, functional calls, Lightning, Opacus."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from tolerances import assert_close
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import pws

X = torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(5))
Y = torch.arange(16) % 5


def network() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    converted = pws.convert(model, X)
    assert isinstance(converted, nn.Sequential)
    return converted


def sgd(model: nn.Module) -> Optimizer:
    return pws.optim.SGD(model, lr=0.1, momentum=0.9)


def train(model: Any, optimizer: Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def trained() -> nn.Module:
    model = network()
    train(model, sgd(model))
    return model


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, value), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(value, wanted, "trajectory float32"), name


def assert_centred(model: nn.Module) -> None:
    for name in pws.marked(model):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert weight.flatten(1).mean(1).abs().max() < 1e-6, name
    assert pws.marked(model)


def test_a_compiled_model_trains_as_it_does_uncompiled() -> None:
    model = network()
    train(torch.compile(model, fullgraph=True, backend="aot_eager"), sgd(model))
    assert_same(model, trained())


def test_an_optimizer_takes_a_compiled_model() -> None:
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    assert isinstance(compiled, nn.Module)
    train(compiled, sgd(compiled))
    assert_same(model, trained())


def test_a_step_can_be_compiled() -> None:
    model = network()
    optimizer = sgd(model)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        step()
    assert_same(model, trained())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_change_nothing(reentrant: bool) -> None:
    model = network()
    inputs = X.clone().requires_grad_(reentrant)
    optimizer = sgd(model)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(checkpoint_sequential(model, 3, inputs, use_reentrant=reentrant), Y).backward()
        optimizer.step()
    assert_same(model, trained())


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
def test_an_averaged_kernel_is_centred(average: Callable[..., None] | None) -> None:
    model = network()
    optimizer, averaged = sgd(model), AveragedModel(model, multi_avg_fn=average)
    for _ in range(4):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
    assert_centred(averaged.module)
    assert not torch.equal(averaged.module[0].weight, model[0].weight)


def test_functional_gradients_are_those_of_the_backward_pass() -> None:
    model = network()
    train(model, sgd(model), 2)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    per_sample = vmap(grad(loss), (None, 0, 0))(parameters, X, Y)
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    for name, value in model.named_parameters():
        assert value.grad is not None
        assert_close(per_sample[name].mean(0), value.grad, "float32")


def test_functional_gradients_can_be_given_to_the_optimizer() -> None:
    model = network()
    optimizer = sgd(model)
    for _ in range(3):
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        found = grad(lambda own: F.cross_entropy(functional_call(model, own, (X,)), Y))(parameters)
        for name, value in model.named_parameters():
            value.grad = found[name]
        optimizer.step()
    assert_same(model, trained())


def test_export_needs_no_special_case() -> None:
    model = trained().eval()
    assert torch.allclose(torch.export.export(model, (X,)).module()(X), model(X), atol=1e-6)


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.model)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)}


def test_lightning_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[Plain, pl.Trainer]:
        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        more: dict[str, Any] = {"enable_checkpointing": False, "accelerator": "cpu", "gradient_clip_val": 1.0}
        trainer = pl.Trainer(max_epochs=epochs, accumulate_grad_batches=2, **quiet, **more)
        module = Plain()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, DataLoader(TensorDataset(X, Y), 4), ckpt_path=checkpoint)
        return module, trainer

    whole, _ = fit(4)
    _, first = fit(2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(4, tmp_path / "half.ckpt")
    assert_centred(whole.model)
    for value, wanted in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(value, wanted)


def test_opacus_trains_a_converted_resnet_untouched_and_within_the_bound() -> None:
    """With the sampler that Opacus has for torch's own Conv2d; its DPOptimizer writes the noisy gradient inside `step`."""
    torch.manual_seed(0)
    images, labels = torch.rand(16, 3, 32, 32), torch.arange(16) % 5
    model = pws.convert(resnet18(num_classes=5), images)
    assert ModuleValidator.validate(model) == []
    optimizer = pws.optim.SGD(model, lr=10.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private, noisy, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(images, labels), 8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        longest = 0.0
        for inputs, targets in loader:
            before = {p: state["w"].clone() for p, state in optimizer.state.items() if "w" in state}
            noisy.zero_grad()
            F.cross_entropy(private(inputs), targets).backward()
            noisy.step()
            moved = [optimizer.state[p]["w"] - was for p, was in before.items()]
            longest = max([longest, *(float(change.norm()) for change in moved)])
    assert_centred(model)
    assert 0 < longest < 0.3 * 1.0001
