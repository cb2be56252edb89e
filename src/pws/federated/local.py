"""What a client does with the network that it receives: train it on its images, or measure it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count, islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from pws._clip_grad import clip_grad
from pws._mark import marked
from pws.federated.federation import LOCAL_EPOCHS, Federation, seed_of
from pws.training.classifier import Classifier
from pws.training.data import ImageData
from pws.training.module import TaskModule
from pws.training.optimizer import build_optimizer, step_bound
from pws.training.schedule import lr_factor

Batch = tuple[Tensor, Tensor]


def train_client(federation: Federation, client: int, number: int, proximal_mu: float) -> float:
    """Train the module's network, which has received its weights, in round `number` (from 1); the mean loss."""
    config, recipe = federation.recipe.federated, federation.recipe
    data = federation.client_data(client)
    per_epoch = len(federation.shares[client]) // recipe.data.batch_size
    steps = config.local_steps or config.local_epochs * per_epoch
    torch.manual_seed(seed_of(recipe.seed, "steps", client, number))
    module = federation.module.train()
    bound = step_bound(recipe.optim, module.method, steps)
    # New in each round: one of `pws.optim` adopts the weights that the client has received.
    optimizer = build_optimizer(module.model, recipe.optim, bound)
    start_round(optimizer, lr_factor(recipe.optim, config.rounds, 1)(number - 1))
    return train_steps(module, optimizer, islice(_batches(data, number), steps), bound, proximal_mu)


def start_round(optimizer: Optimizer, factor: float) -> None:
    """Set the learning rates of a round, whose schedule has this factor now.

    As under a scheduler of torch, each group notes its largest rate, which the bound on a step is for.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        group["lr"] *= factor


def train_steps(
    module: TaskModule,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    bound: float | None = None,
    proximal_mu: float = 0.0,
) -> float:
    """A step per batch, bounded for layers whose optimizer does not do it.

    With `proximal_mu` the loss grows by half of it times the squared distance to the start.
    """
    model, losses = module.model, []
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    start = [parameter.detach().clone() for parameter in parameters] if proximal_mu else []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = torch.stack(list(module.losses(_on_device(module, images, labels)).values())).sum()
        loss.backward()
        for parameter, received in zip(parameters, start, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - received, alpha=proximal_mu)
        _before_step(module, model, optimizer, bound)
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def _before_step(module: TaskModule, model: nn.Module, optimizer: Optimizer, bound: float | None) -> None:
    """What training does to gradients: the method's bound, its rule, the recipe's clipping."""
    if bound is not None and not marked(model):
        clip_grad(model, optimizer, bound)
    if module.method is not None and module.method.gradients is not None:
        module.method.gradients(model, optimizer)
    if module.optim.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), module.optim.clip_norm)


def _batches(data: ImageData, number: int) -> Iterator[Batch]:
    """A client's batches of a round, epoch after epoch, each in an order of its own."""
    for epoch in count(number * LOCAL_EPOCHS):
        data.first_epoch = epoch
        yield from data.train_dataloader()


@torch.no_grad()
def measure(module: TaskModule, batches: Iterable[Batch]) -> dict[str, float]:
    """Accuracy, mean loss and the number of images."""
    assert isinstance(module, Classifier)
    module.eval()
    right, loss, images = 0, 0.0, 0
    for inputs, labels in batches:
        inputs, labels = _on_device(module, inputs, labels)
        logits = module(inputs).float()
        right += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        images += len(labels)
    return {"accuracy": right / max(1, images), "loss": loss / max(1, images), "num-examples": images}


def _on_device(module: TaskModule, images: Tensor, labels: Tensor) -> Batch:
    parameter = next(module.parameters())
    labels = labels.to(parameter.device, parameter.dtype if labels.is_floating_point() else None)
    return images.to(parameter.device, parameter.dtype), labels
