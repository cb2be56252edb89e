"""The part of a recipe that makes a run private."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from pws._errors import PwsError
from pws.training.rules import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Rule, check_only, check_rules

DELTA: Final[Rule] = ("above 0 and below 1", lambda value: 0 < value < 1)
PRIVACY_RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(("epsilon", "clip_norm"), POSITIVE),
    "noise": NOT_NEGATIVE,
    "delta": DELTA,
    **dict.fromkeys(("physical_batch_size", "augmentations"), AT_LEAST_ONE),
}
UNLIKE_PRIVACY: Final[dict[str, tuple[Any, str]]] = {
    "task": ("classify", "it is built for classifiers"),
    "data.mixup_alpha": (0.0, "an image would stand in the gradients of two"),
    "data.cutmix_alpha": (0.0, "an image would stand in the gradients of two"),
    "data.ra_reps": (
        1,
        "an image would be counted several times; privacy.augmentations repeats it within its own gradient",
    ),
    "optim.clip_norm": (None, "privacy.clip_norm clips the gradient of each image"),
    "trainer.accumulate": (1, "privacy.physical_batch_size splits a step"),
    "trainer.compile": (False, "Opacus' hooks take the gradient of each image, and a compiled network has none"),
    "trainer.checkpoint_activations": (False, "Opacus' hooks would see each layer twice"),
    "trainer.num_nodes": (1, "it trains in one process"),
}
"""Settings with the only value that a private run takes, and why."""


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy (DP-SGD by Opacus); nothing is private unless epsilon or noise is set.

    Args:
        epsilon: the privacy to spend in all; the noise that this takes is computed.
        noise: deviation of the noise on the summed gradient, in units of clip_norm; in place of epsilon.
        delta: the probability with which epsilon may fail; below 1 / number of training images.
        clip_norm: the norm to which the gradient of each image is clipped.
        accountant: what adds up the privacy spent, of Opacus: prv, or rdp, whose epsilon is larger and sooner computed.
        physical_batch_size: images of one backward pass, with their augmented copies; a step takes as many passes as it needs.
        augmentations: copies of each image, each augmented in its own way; their mean gradient is clipped.
        mode: how Opacus takes the gradients of single images: hooks keeps them, ghost computes their norms alone.
    """

    epsilon: float | None = None
    noise: float | None = None
    delta: float = 1e-5
    clip_norm: float = 1.0
    accountant: Literal["prv", "rdp"] = "prv"
    physical_batch_size: int = 256
    augmentations: int = 1
    mode: Literal["hooks", "ghost"] = "hooks"

    def __post_init__(self) -> None:
        check_rules(PRIVACY_RULES, self, "privacy.")
        if self.epsilon is not None and self.noise is not None:
            raise PwsError(
                f"privacy.epsilon ({self.epsilon:g}) tells how much noise a run takes, and privacy.noise ({self.noise:g}) sets "
                "it: give one, and null for the other if the recipe sets it."
            )
        if self.augmentations > 1 and self.mode == "ghost":
            raise PwsError(
                f"privacy.augmentations {self.augmentations} averages the gradients of an image's copies, and privacy.mode "
                "ghost never has them. Use mode hooks."
            )
        if self.physical_batch_size < self.augmentations:
            raise PwsError(
                f"privacy.physical_batch_size must hold the {self.augmentations} copies of an image at least; got "
                f"{self.physical_batch_size}."
            )

    @property
    def wanted(self) -> bool:
        """Whether the run is private."""
        return self.epsilon is not None or self.noise is not None


def check_delta(privacy: PrivacyConfig, images: int) -> None:
    """Raise `PwsError` if publishing one whole image at random would pass for private."""
    if privacy.delta >= 1 / images:
        raise PwsError(
            f"privacy.delta must be below 1 / {images:,}, the number of training images: with more, a run that publishes one "
            f"of them would count as private. Got {privacy.delta:g}; usual: {0.1 / images:.1g}."
        )


def check_private(recipe: Any) -> None:
    """Raise `PwsError` for a setting that a private run can't have."""
    check_only(recipe, UNLIKE_PRIVACY, "a private run (privacy.epsilon or noise)")
    trainer, privacy = recipe.trainer, recipe.privacy
    if trainer.precision.startswith("16") or trainer.strategy != "auto" or trainer.devices not in ("auto", 1):
        raise PwsError(
            "a private run takes one process (trainer.devices 1, strategy auto) and trainer.precision 32-true, 64-true or "
            f"bf16-mixed; got devices {trainer.devices}, strategy {trainer.strategy}, precision {trainer.precision}."
        )
    if privacy.mode == "ghost" and trainer.precision == "bf16-mixed":
        raise PwsError(
            "privacy.mode ghost takes two backward passes, which bf16-mixed rounds in different ways: an image's gradient "
            "could be longer than privacy.clip_norm. Use trainer.precision 32-true, or mode hooks."
        )
    if recipe.model.method == "gc":
        raise PwsError(
            "model.method gc changes gradients alone, and in a private run Opacus' optimizer makes them: gc would be none. Use "
            "model.method none, or pws."
        )
    if privacy.augmentations > 1 and not (recipe.data.augment or recipe.data.auto_augment or recipe.data.random_erase):
        raise PwsError(
            f"privacy.augmentations {privacy.augmentations} averages over augmented copies of an image, and the recipe has no "
            "augmentation. Set data.augment, data.auto_augment or data.random_erase."
        )
