"""A detector's backbone: weights from a classification run, stages that are not trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from pws._errors import PwsError
from pws.training.checkpoints import checkpoint_path, misfits, read_weights
from pws.training.federated import check_has_norms
from pws.training.recipe import ModelConfig
from pws.training.recipe_file import load_recipe

SAME_WEIGHTS: Final = {"frozen-bn": "bn"}
"""Methods whose backbone is that of another one's run."""
STAGES: Final = 5
PRETRAINED_STAGES: Final = 3
"""Stages that are trained of a backbone with weights, unless the recipe says otherwise."""


def load_backbone(model: nn.Module, config: ModelConfig) -> None:
    """Give the backbone the weights of the best checkpoint of the run in `config.backbone`.

    Raises:
        PwsError: there is no such run, or its network or method is another one.
    """
    run = Path(str(config.backbone))
    if not (run / "recipe.yaml").is_file():
        raise PwsError(
            f"model.backbone must be a run's folder; {run} has no recipe.yaml. Train a classifier there first."
        )
    theirs = load_recipe(run / "recipe.yaml")
    wanted = SAME_WEIGHTS.get(config.method, config.method)
    if theirs.task != "classify" or theirs.model.method != wanted:
        raise PwsError(
            f"model.backbone must be a classification run with model.method {wanted}; {run} is a run of task {theirs.task} "
            f"with {theirs.model.method}. Train one: pws train RECIPE --model.method {wanted}."
        )
    check_has_norms(theirs.federated)
    weights = read_weights(checkpoint_path(run, "best"))
    own = dict(_backbone_tensors(model))
    found = {name: weights[key] for name in own if (key := f"model.{_name_in_classifier(name)}") in weights}
    problems = misfits(found, own)
    if problems:
        raise PwsError(
            f"model.backbone: {run} holds a {theirs.model.name}, whose weights are not those of {config.name}'s backbone: "
            f"{len(problems)} differences to its {len(own)} tensors, such as {sorted(problems)[0]}. Train the classifier "
            "torchvision:resnet18 for a resnet18, torchvision:mobilenet_v3_large for a mobilenetv3."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])


def _backbone_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.startswith("backbone.body."):
            yield name, tensor


def _name_in_classifier(name: str) -> str:
    """torchvision's classifiers hold the same layers: ResNet by the same names, MobileNet in `features`."""
    inner = name.removeprefix("backbone.body.")
    return f"features.{inner}" if inner[0].isdigit() else inner


def stages_trained(config: ModelConfig) -> int | None:
    """How many of the backbone's last stages the recipe trains; None for all."""
    stages = config.trainable_stages
    return PRETRAINED_STAGES if stages is None and config.backbone is not None else stages


def freeze_stages(model: nn.Module, trainable: int | None) -> None:
    """Train the last `trainable` of the backbone's five stages, all if None; the stages begin at the strides.

    Raises:
        PwsError: there are not so many, or the detector's backbone has no stages.
    """
    if trainable is None:
        return
    stages = _stages(model)
    if not 0 <= trainable <= STAGES or len(stages) != STAGES:
        raise PwsError(
            f"model.trainable_stages must be 0 to {STAGES}, of a backbone with {STAGES} stages (a ResNet or MobileNet with a "
            f"pyramid); got {trainable} of {len(stages)}."
        )
    for stage in stages[: STAGES - trainable]:
        for module in stage:
            module.requires_grad_(False)


def _stages(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of each stage, from the image on."""
    body: Any = getattr(getattr(model, "backbone", None), "body", nn.Module())
    stages: list[list[nn.Module]] = [[]]
    for name, module in body.named_children():
        if name.startswith("layer") or getattr(module, "_is_cn", False):
            stages.append([])
        stages[-1].append(module)
    return stages
