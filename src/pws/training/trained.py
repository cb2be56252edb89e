"""A finished run's network, ready to predict: what `pws.load` returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from pws._errors import PwsError
from pws.training.checkpoints import checkpoint_path, load_weights, read_weights
from pws.training.classifier import logits_of
from pws.training.data import normalized
from pws.training.detect.facts import ObjectFacts
from pws.training.facts import ImageFacts, read_facts
from pws.training.federated import check_has_norms
from pws.training.recipe import Recipe
from pws.training.recipe_file import load_recipe
from pws.training.tasks import TASKS, check_named, module_of

SCORE: Final = 0.5
"""Objects below it are left out."""
AT_ONCE: Final = 256
"""Images that go through a network together."""


class Trained(nn.Module, ABC):
    """A network with all it needs to predict, in eval mode."""

    network: nn.Module
    """The plain network, for `pws.fold`, `pws.diagnose`, or more training."""
    classes: list[str]
    """The names of the classes, in the order of the labels."""
    recipe: Recipe
    """What the run trained."""
    checkpoint: Path
    """Where the weights come from."""

    def __init__(self, network: nn.Module, classes: list[str], recipe: Recipe, checkpoint: Path) -> None:
        super().__init__()
        self.network, self.classes, self.recipe, self.checkpoint = network, classes, recipe, checkpoint
        self.eval()

    @abstractmethod
    def predict(self, images: Any) -> Any:
        """What the network finds."""

    @property
    def device(self) -> torch.device:
        """Where the network is; images are brought there."""
        return next(self.network.parameters()).device


class TrainedClassifier(Trained):
    """A classifier of images `(N, C, H, W)` as they are: bytes, or floats with 1 for white. It normalizes them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, facts: ImageFacts, recipe: Recipe, checkpoint: Path) -> None:
        super().__init__(network, facts.classes, recipe, checkpoint)
        self.facts = facts
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(facts, name))[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, classes)`.

        Raises:
            PwsError: these are no images of the run's channels.
        """
        channels = self.facts.channels
        if images.dim() != 4 or images.shape[1] != channels or images.dtype not in _PIXELS:
            raise PwsError(
                f"this network takes images (N, {channels}, height, width) of uint8 or floating-point pixels; got "
                f"{tuple(images.shape)} of {images.dtype}. A single image is images[None]; model.prepare takes the pixels of "
                "a picture."
            )
        inputs = normalized(images.to(self.device), self.mean, self.std).to(self.mean.dtype)
        return logits_of(self.network(inputs), len(self.classes))

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities `(N, classes)` in float64, on the CPU.

        Raises:
            PwsError: the network's outputs are not finite.
        """
        parts = [self(part).double().softmax(1).cpu() for part in images.split(AT_ONCE)]
        found = torch.cat(parts)
        if not torch.isfinite(found).all():
            raise PwsError(
                f"the network's outputs are not finite: the training of {self.checkpoint} has diverged. Use another checkpoint."
            )
        return found

    def predict(self, images: Tensor) -> Tensor:
        """Labels `(N,)`; `classes` has their names."""
        return self.probabilities(images).argmax(1)

    def prepare(self, picture: Tensor) -> Tensor:
        """A picture's pixels `(3, H, W)` uint8 as one of the run's test images: resized or cropped, and grey if those are.

        Raises:
            PwsError: the run's images are no pictures.
        """
        return self.facts.prepare(picture)


_PIXELS: Final = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TrainedDetector(Trained):
    """A detector of images `(3, H, W)` of any size: bytes, or floats with 1 for white."""

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Boxes, labels (from 1), scores (masks, keypoints) of each image, as torchvision's detectors return them."""
        floats = [image.float() / 255 if image.dtype == torch.uint8 else image for image in images]
        found: list[dict[str, Tensor]] = self.network([image.to(self.device) for image in floats])
        return found

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor], score: float = SCORE) -> list[dict[str, Tensor]]:
        """The same of the objects with this score or more, on the CPU; the name of label k is `classes[k - 1]`."""
        results = []
        for image in images:
            (found,) = self([image])
            sure = found["scores"] >= score
            results.append({name: value[sure].cpu() for name, value in found.items()})
        return results


def trained_of(run: str | Path, checkpoint: str = "best", *, device: str | torch.device = "cpu") -> Trained:
    """`pws.load`."""
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise PwsError(f"{run} is no run folder: it has no recipe.yaml. Give the folder that `pws train` printed.")
    recipe = load_recipe(run / "recipe.yaml")
    check_named(recipe)
    path = checkpoint_path(run, checkpoint)
    facts = read_facts(run, TASKS[recipe.task].facts)
    with torch.random.fork_rng(devices=[]):
        module = module_of(recipe, facts.stand_in(recipe.data, recipe.seed), fresh=False)
    load_weights(module, path, recipe)
    if isinstance(facts, ImageFacts):
        return TrainedClassifier(module.model, facts, recipe, path).to(device)
    assert isinstance(facts, ObjectFacts)
    return TrainedDetector(module.model, facts.classes, recipe, path).to(device)


def weights(run: str | Path, checkpoint: str = "best") -> dict[str, Tensor]:
    """The state dict of the network that a run trained, whatever network that is.

    Args:
        run: the run's folder.
        checkpoint: "best", "last" or the path of a file.

    Raises:
        PwsError: the checkpoint is missing, damaged, or without the norms.
    """
    check_has_norms(load_recipe(Path(run) / "recipe.yaml").federated)
    stored = read_weights(checkpoint_path(Path(run), checkpoint))
    return {name.removeprefix("model."): value for name, value in stored.items() if name.startswith("model.")}
