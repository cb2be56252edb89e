"""Recipes: what a run trains, on what, how and where. A YAML file holds any part of it; flags override the file.

Each part checks its own numbers when it is made, whether in Python, from a file or from flags: it raises `PwsError`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from pws._errors import PwsError, shown
from pws.training.federated import FederatedConfig, check_federated
from pws.training.private.config import PrivacyConfig, check_private
from pws.training.rules import (
    AT_LEAST_ONE,
    BELOW_ONE,
    DEVICES,
    LOADERS,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    SIDE,
    WIDTH,
    Rule,
    check_rules,
)

TaskName = Literal["classify", "detect"]
FSDP2: Final = "fsdp2"
Augmentation = Literal["flip", "jitter", "ssd"]
ALPHA: Final[Rule] = ("0 (none), or from 0.001 to 1,000", lambda value: value == 0 or 1e-3 <= value <= 1e3)
RA_MAGNITUDE: Final[Rule] = ("from 0 to 30", lambda value: 0 <= value <= 30)
RA_REPS: Final[Rule] = ("at least 1, and at most 100", lambda value: 1 <= value <= 100)
MODEL_RULES: Final[dict[str, Rule]] = {
    "width": WIDTH,
    "dropout": BELOW_ONE,
    "anchor_size": SIDE,
    "trainable_stages": NOT_NEGATIVE,
    "num_classes": AT_LEAST_ONE,
}
DATA_RULES: Final[dict[str, Rule]] = {
    "image_size": SIDE,
    "workers": LOADERS,
    **dict.fromkeys(("batch_size", "train_images"), AT_LEAST_ONE),
    "validation": BELOW_ONE,
    **{"ra_magnitude": RA_MAGNITUDE, "random_erase": SHARE, "ra_reps": RA_REPS},
    **dict.fromkeys(("mixup_alpha", "cutmix_alpha"), ALPHA),
    "max_corrupt": NOT_NEGATIVE,
}
CLASSIFY_ONLY: Final = (
    *("model.dropout", "model.standardize_head", "model.calibrate"),
    *("data.auto_augment", "data.ra_magnitude", "data.random_erase", "data.mixup_alpha", "data.cutmix_alpha"),
    *("data.ra_reps", "data.max_corrupt", "optim.label_smoothing", "trainer.compile"),
)
DETECT_ONLY: Final = ("model.backbone", "model.trainable_stages", "model.head", "model.anchor_size", "model.options")
OPTIM_RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(("clip_norm", "step_bound", "decay"), POSITIVE),
    **dict.fromkeys(("lr", "weight_decay", "scale_lr_factor", "warmup_epochs"), NOT_NEGATIVE),
    **dict.fromkeys(("momentum", "label_smoothing", "ema"), BELOW_ONE),
}
TRAINER_RULES: Final[dict[str, Rule]] = {
    "devices": DEVICES,
    **dict.fromkeys(("epochs", "max_steps", "num_nodes", "accumulate", "early_stop", "checkpoint_steps"), AT_LEAST_ONE),
}


@dataclass(frozen=True)
class ModelConfig:
    """The network and its method.

    Args:
        name: allconv; preact (56 layers), preact11, 29, 101; cifar-resnet18, 34; wrn16-4, wrn40-4; resnet18, 34, 50, 101, 152;
            stack4, 8, 10, 16, 20, 32, 100. Or torchvision:NAME, timm:NAME or package.module:factory: a model with BatchNorm,
            which the method replaces. For task detect: FAMILY-BACKBONE, such as mask-rcnn-resnet18; families faster-rcnn,
            mask-rcnn, keypoint-rcnn, retinanet and fcos on resnet18, 34, 50 and mobilenetv3; ssd-vgg16 and
            ssdlite-mobilenetv3.
        method: none, bn, gn, ws, nf, pws-paper or pws. For networks of this package also ln, in, sn, frn, wn, centred, gc or
            skipinit; for models of others and detectors also frozen-bn, whose norms keep the statistics that they have.
        width: factor on the number of channels of every layer.
        num_classes: number of classes that the data must have; taken from the data if left out.
        backbone: (detect) the folder of a classification run, whose weights the backbone starts with.
        trainable_stages: (detect) the last so many of the backbone's five stages are trained; all if it starts from random
            weights, else 3.
        head: (detect, R-CNN) mlp, two linear layers on each region, or conv, four convolutions and a linear layer.
        anchor_size: (detect) side of the smallest anchor, in pixels of the resized image.
        options: (detect) numbers of torchvision's class by its names, such as box_batch_size_per_image.
        dropout: probability with which each input of the head is left out of a training step.
        gain: (pws, networks of this package) gain of every layer, a number or an activation's name; "relu" if left out,
            2 ** 0.5 in the paper.
        gamma: (pws, pws-paper) added to the variance inside the root, in units of weight squared; 1e-3 if left out.
        relative_gamma: (pws) add gamma * 2 / fan_in instead.
        standardize_head: (pws, networks of this package) standardize the head too; true if left out.
        form: (pws) optimizer, which keeps the kernels of plain layers standardized, or layers, which standardize in each
            forward pass; optimizer if left out, layers in private runs.
        calibrate: scale kernels once, on the first training batch. "initalpha" is the paper's: output variance 2 for the stem
            and the first convolution of each block. "all" gives every standardized layer output variance 1.
    """

    name: str = "allconv"
    method: str = "pws"
    width: float = 1.0
    num_classes: int | None = None
    backbone: str | None = None
    trainable_stages: int | None = None
    head: Literal["mlp", "conv"] = "mlp"
    anchor_size: int = 32
    options: dict[str, int | float] = field(default_factory=dict)
    dropout: float = 0.0
    gain: float | str | None = None
    gamma: float | None = None
    relative_gamma: bool | None = None
    standardize_head: bool | None = None
    form: Literal["optimizer", "layers"] | None = None
    calibrate: Literal["none", "initalpha", "all"] = "none"

    def __post_init__(self) -> None:
        check_rules(MODEL_RULES, self, "model.")


@dataclass(frozen=True)
class DataConfig:
    """The images.

    Args:
        name: digits, fashion-mnist, cifar10, cifar100, imagenet, folder (root/train/CLASS/..., root/val/CLASS/...), stream
            (shards written by pws pack), or npz (root is a file in MedMNIST's layout). For task detect: digit-scenes, scenes
            (made by pws scenes), coco, coco-keypoints, voc, stream.
        root: folder of the files; digits needs none. For stream also a URL, such as s3://bucket/folder.
        download: let torchvision download what is missing (fashion-mnist, cifar10, cifar100).
        batch_size: images per step of the optimizer, over all devices and accumulated batches together.
        augment: random crop of the image padded by an eighth, and flip (not for digits); for imagenet and folder a random
            resized crop and flip. For task detect: flip (true is the same), jitter (scale jitter, crop and flip) or ssd
            (photometric distortion, zoom out, crop and flip).
        auto_augment: (classify) further changes of colour and shape, torchvision's: ra (RandAugment) or ta_wide
            (TrivialAugment).
        ra_magnitude: (ra) how strong they are, from 0 to 30.
        random_erase: (classify) probability with which a rectangle of the normalized image becomes 0.
        mixup_alpha: (classify) mix each image and its label with another of its batch; the share is drawn from
            Beta(alpha, alpha). 0 for none. A batch is here what one process computes at a time.
        cutmix_alpha: (classify) the same with a rectangle cut from the other. With mixup too, a batch has one of them.
        ra_reps: (classify) repeated augmentation: each image comes so many times in a batch, augmented in another way each
            time. An epoch stays as long, and has as many fewer images.
        image_size: side in pixels that images are resized to; their own if left out, 224 for imagenet and folder. For task
            detect the shorter side; 800 if left out, 320 for SSD, whose images are squares.
        train_images: use only this many training images, drawn by the seed.
        validation: as many images as this share of the training images are held out, drawn by the seed; they tell the best
            epoch. npz with val_images and a folder with test/ bring such images themselves. 0 for none: the last epoch counts.
        workers: number of loader processes.
        max_corrupt: (folder, imagenet, stream) so many images of each part that can't be decoded are named and replaced by the
            next one; one more ends the run.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = False
    batch_size: int = 128
    augment: bool | Augmentation = False
    auto_augment: Literal["ra", "ta_wide"] | None = None
    ra_magnitude: int = 9
    random_erase: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    ra_reps: int = 1
    image_size: int | None = None
    train_images: int | None = None
    validation: float = 0.1
    workers: int = 0
    max_corrupt: int = 0

    def __post_init__(self) -> None:
        check_rules(DATA_RULES, self, "data.")
        if self.ra_reps > 1 and not (self.augment or self.auto_augment or self.random_erase):
            raise PwsError(
                f"data.ra_reps {self.ra_reps} repeats each image, augmented in another way each time, and the recipe has no "
                "augmentation. Set data.augment, data.auto_augment or data.random_erase."
            )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule.

    Args:
        name: sgd, adamw, rmsprop, lamb or muon (AdamW for what is not a matrix). For standardized layers it is the optimizer of
            pws.optim.
        lr: learning rate, for batches of batch_size.
        momentum: momentum of sgd, rmsprop and muon.
        nesterov: (sgd) Nesterov momentum.
        weight_decay: decay of the weights; alpha, biases and norm parameters have none.
        scale_lr_factor: (pws) factor on the learning rate of alpha and bias.
        schedule: constant; step (times decay at each milestone); cosine or linear, both to 0.
        milestones: (step) epochs at which the learning rate falls.
        decay: (step) factor at each milestone.
        warmup_epochs: epochs over which the learning rate rises linearly from 0; fractions too.
        clip_norm: clip the gradient to this global norm, in place of the method's own step bound.
        step_bound: no layer's step is longer than this. "method" takes the method's own: for pws 0.3 * (1 - momentum) with sgd
            and 0.05 with others, none for other methods. null means no bound.
        ema: validate, test and store an average of the weights: after each step this part of it stays, the rest is the weights.
        label_smoothing: part of each label that is spread over all classes.
    """

    name: Literal["sgd", "adamw", "rmsprop", "lamb", "muon"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    scale_lr_factor: float = 1.0
    schedule: Literal["constant", "step", "cosine", "linear"] = "cosine"
    milestones: list[int] = field(default_factory=list)
    decay: float = 0.1
    warmup_epochs: float = 0.0
    clip_norm: float | None = None
    step_bound: float | Literal["method"] | None = "method"
    ema: float | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_rules(OPTIM_RULES, self, "optim.")
        if self.clip_norm is not None and self.step_bound not in (None, "method"):
            raise PwsError(
                f"optim.clip_norm ({self.clip_norm}) and optim.step_bound ({self.step_bound}) both clip the gradient: give "
                "one, and null for the other if the recipe sets it."
            )
        if self.schedule == "step" and not self.milestones:
            raise PwsError(
                "optim.schedule step needs optim.milestones, the epochs at which the rate falls, such as [30, 60]."
            )
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise PwsError(
                f"optim.nesterov needs optim.name sgd and optim.momentum above 0; got {self.name} and momentum "
                f"{self.momentum:g}."
            )


@dataclass(frozen=True)
class TrainerConfig:
    """Where and how long; handed to Lightning's Trainer.

    Args:
        epochs: epochs to train.
        max_steps: end after this many steps of the optimizer if that is earlier; the schedule ends there too.
        accelerator: auto, cpu, gpu.
        devices: number of devices per node, or auto.
        num_nodes: number of machines.
        strategy: auto, ddp, or fsdp2, with which each process holds a part of the parameters and of the optimizer's state.
        precision: 32-true, bf16-mixed, 16-mixed, 64-true.
        accumulate: split each step's batch into this many parts, one after the other.
        early_stop: stop after this many epochs without a better accuracy, or average precision of boxes, on the validation
            images.
        checkpoint_steps: store a checkpoint after so many steps too, not at the end of each epoch alone; --resume goes on from
            there.
        compile: (classify) let torch.compile build the network's passes; checkpoints stay those of the plain network.
        checkpoint_activations: keep the inputs of residual blocks alone, and run the blocks again in the backward pass: less
            memory, a third more time.
        logger: wandb or mlflow: where metrics.csv's numbers go too. Project or experiment pws; files in the run's folder.
    """

    epochs: int = 10
    max_steps: int | None = None
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    accumulate: int = 1
    early_stop: int | None = None
    checkpoint_steps: int | None = None
    compile: bool = False
    checkpoint_activations: bool = False
    logger: Literal["wandb", "mlflow"] | None = None

    def __post_init__(self) -> None:
        check_rules(TRAINER_RULES, self, "trainer.")
        if self.strategy != FSDP2 and self.strategy.split("_")[0] not in ("auto", "ddp"):
            raise PwsError(
                f"trainer.strategy must be auto, ddp (or a variant, such as ddp_spawn) or {FSDP2}; got {self.strategy!r}. "
                "Other sharded strategies flatten the parameters; weight decay by parameter and the filters do not survive it."
            )
        if self.compile and self.checkpoint_activations:
            raise PwsError(
                "trainer.compile chooses by itself what is computed again in the backward pass: leave out "
                "trainer.checkpoint_activations, or trainer.compile."
            )


@dataclass(frozen=True)
class Recipe:
    """A run from start to end.

    Args:
        name: the run's folder below --runs; the recipe file's name if left out.
        task: classify, or detect (objects with boxes, masks and keypoints).
        seed: seed of the weights, the order of images and the augmentation.
        model: the network and its method.
        data: the images.
        optim: the optimizer and its schedule.
        trainer: where and how long.
        privacy: trains with differential privacy where its epsilon or noise is set.
        federated: divides the images among clients; `pws federate` trains such a recipe.
    """

    name: str = ""
    task: TaskName = "classify"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    federated: FederatedConfig = field(default_factory=FederatedConfig)

    def __post_init__(self) -> None:
        check_rules({"seed": SEED}, self)
        if self.federated.wanted:
            check_federated(self)
        if self.privacy.wanted:
            check_private(self)
            if self.model.method == "pws" and self.model.form is None:
                # Layers take the average gradient out of each image's own gradient, before it is clipped.
                object.__setattr__(self, "model", replace(self.model, form="layers"))
        if self.trainer.early_stop is not None and not self.data.validation:
            raise PwsError(
                "trainer.early_stop waits for a better result on the validation images, and data.validation 0 leaves none. Set "
                "a share, such as --data.validation 0.1, or leave early_stop out."
            )
        if self.optim.ema is not None and self.trainer.strategy == FSDP2:
            raise PwsError(
                "optim.ema averages whole weights, and trainer.strategy fsdp2 shards them. Use ddp, or no average."
            )
        if self.task == "classify":
            _check_left_out(self, DETECT_ONLY, "task detect")
            if isinstance(self.data.augment, str):
                raise PwsError(f"data.augment is true or false for task classify; got {self.data.augment!r}.")
        else:
            _check_left_out(self, CLASSIFY_ONLY, "task classify")
        if self.name and not re.fullmatch(r"[\w+-][\w.+-]*", self.name):
            raise PwsError(
                "name is a folder's name: letters, digits, '.', '_', '+', '-', not a '.' first; got "
                f"{shown(self.name)}."
            )


def _check_left_out(recipe: Recipe, settings: tuple[str, ...], task: str) -> None:
    """Raise `PwsError` for a setting that another task has."""
    for setting in settings:
        part, name = setting.split(".")
        config = getattr(recipe, part)
        if getattr(config, name) != getattr(type(config)(), name):
            raise PwsError(
                f"{setting} is a setting of {task}, and this recipe's task is {recipe.task}. Leave it out, or set task."
            )
