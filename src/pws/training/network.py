"""The network of a recipe: one of pws.models by name and method, or a model of others, as it is or converted."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from pws._errors import PwsError, memory_ran_out, one_line
from pws._layers import StandardizedLayer
from pws._mark import marked
from pws.methods import APPLIED, Method, apply_method, build_method
from pws.models import ResNet, build_model, model_of
from pws.training.classifier import logits_of
from pws.training.data import ImageBatches
from pws.training.images import Splits
from pws.training.memory import check_memory
from pws.training.recipe import ModelConfig

BYTES: Final = 12
"""What a parameter takes in training at least: its value, its gradient, its momentum."""
SMALL_WIDTH: Final = 0.125
CONVERTED_ON: Final = 64
"""Training images that alpha is set on when a model of others is converted."""


def model_for(config: ModelConfig, splits: Splits, method: Method | None = None, *, noise: bool = False) -> nn.Module:
    """The recipe's network for this data, checked on one image; `method` replaces the recipe's.

    A model of others is converted on training images, or on `noise`, which tells nothing of them.

    Raises:
        PwsError: another number of classes, an unknown name, an option of another method, or images of a size or with
            values that the network can't take.
    """
    classes = check_classes(config, splits.classes)
    method = method or method_for(config)
    image, _ = splits.test.get([0])
    if ":" in config.name:
        model = _model_of_others(config, splits, noise=noise)
    else:
        sizes: dict[str, Any] = {"in_channels": image.shape[1], "num_classes": classes}
        if config.width > 1:
            _check_width(config, method, sizes)
        model = build_model(config.name, method, width=config.width, **sizes)
    if config.dropout:
        model.head = nn.Sequential(nn.Dropout(config.dropout), model.get_submodule("head"))
    try:
        with torch.no_grad():
            logits_of(model.eval()(image.float()), classes)
    except RuntimeError as error:
        if memory_ran_out(error):
            raise
        raise PwsError(
            f"{config.name} can't take images of {image.shape[2]} x {image.shape[3]} pixels ({one_line(error)}). "
            "Set a larger --data.image_size."
        ) from error
    # Convolutions run faster in this layout, on the CPU (a training step of allconv takes 0.6 to 0.93 of the time) and on
    # GPUs with tensor cores alike; ImageBatches yields the images in it.
    return model.train().to(memory_format=torch.channels_last)


def check_classes(config: ModelConfig, names: list[str]) -> int:
    """The data's number of classes; raises `PwsError` if the recipe asks for another one."""
    classes = len(names)
    if config.num_classes not in (None, classes):
        raise PwsError(
            f"model.num_classes must be the data's number of classes; got {config.num_classes}, the data has {classes} "
            f"({', '.join(names[:5])}{', ...' if classes > 5 else ''}). Leave it out, or check data.name and root."
        )
    return classes


def _check_width(config: ModelConfig, method: Method, sizes: dict[str, Any]) -> None:
    """Raise `PwsError` if the network can't be trained in the machine's memory: its parameters grow with the width squared."""
    with torch.random.fork_rng(devices=[]):
        small = build_model(config.name, method, width=SMALL_WIDTH, **sizes)
    count = sum(p.numel() for p in small.parameters()) * (config.width / SMALL_WIDTH) ** 2
    check_memory(BYTES * count, f"{config.name} of width {config.width:g}, with some {count:.1g} parameters,")


def _model_of_others(config: ModelConfig, splits: Splits, *, noise: bool) -> nn.Module:
    """With the recipe's method in place of its BatchNorm; its scales are those of training images, or of noise."""
    if config.method not in APPLIED or config.dropout or config.width != 1:
        raise PwsError(
            f"a model of others ({config.name}) trains with model.method {', '.join(APPLIED)}, without model.width and "
            f"model.dropout; got method {config.method}, width {config.width:g}, dropout {config.dropout:g}."
        )
    every = max(1, len(splits.train) // CONVERTED_ON)  # folders hold their images class by class
    images, _ = ImageBatches(splits.train, splits, seed=0)[0, list(range(0, len(splits.train), every))[:CONVERTED_ON]]
    images = torch.randn_like(images) if noise else images
    model = model_of(config.name, num_classes=len(splits.classes), in_channels=images.shape[1])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PwsError(f"{config.name} has nothing to train: none of its parameters takes a gradient (requires_grad).")
    return apply_method(model, config.method, images, **method_options(config))


def method_for(config: ModelConfig) -> Method:
    """The recipe's method, with its options."""
    return build_method(config.method, **method_options(config))


def method_options(config: ModelConfig) -> dict[str, Any]:
    """The options of the method that the recipe sets."""
    options = {key: getattr(config, key) for key in ("gain", "gamma", "relative_gamma", "standardize_head", "form")}
    return {key: value for key, value in options.items() if value is not None}


def check_calibration(config: ModelConfig, model: nn.Module) -> None:
    """Raise `PwsError` if the network has nothing that the recipe's calibration could set."""
    if config.calibrate == "none":
        return
    if not marked(model) and not any(isinstance(module, StandardizedLayer) for module in model.modules()):
        raise PwsError(
            f"model.calibrate scales standardized kernels, and the method {config.method} has none. Use method pws, or "
            "calibrate none."
        )
    if config.calibrate == "initalpha" and not isinstance(model, ResNet):
        raise PwsError(
            f"model.calibrate initalpha is defined by residual blocks, and {config.name} has none. Use all or none."
        )
