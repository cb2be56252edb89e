"""`pws convert`: take the norms out of a model of anybody's."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from torch import nn

from pws._errors import PwsError, one_line
from pws._files import write_folder
from pws.cli.arguments import add_input_shape, check_folder, check_sizes, command_parser, parse
from pws.surgery import plan
from pws.surgery._plan import Form, Plan
from pws.surgery.plan_file import plan_text
from pws.training.checkpoints import misfits
from pws.training.datasets import DATASETS
from pws.training.detect.datasets import DETECTION_DATASETS
from pws.training.model_and_data import RANDOM, ModelAndData, load_model

LOAD = '''"""The converted model: `from load import model`, in this folder. {training}"""

from pathlib import Path

import torch

import pws
from pws.models import model_of

folder = Path(__file__).parent
example = {example}
model = pws.Plan.load(folder / "plan.json").apply(model_of({spec!r}))
model.load_state_dict(torch.load(folder / "weights.pt"))
'''
TRAINING: Final[dict[Form, str]] = {
    "optimizer": "Its layers are plain and marked; an optimizer of pws.optim trains it: pws.optim.SGD(model, lr=0.1).",
    "layers": "Its layers are pws layers; any optimizer trains it, with pws.clip_grad(model, optimizer) before each step.",
}
"""How to go on, a line a form."""


def run(arguments: list[str]) -> int:
    """Parse, plan, print, convert, write."""
    parsed = parse(_parser(), arguments)
    out = Path(parsed.out)
    _check(parsed, out)
    images = parsed.batch_size or (256 if parsed.warm_start else 32)
    loaded = load_model(
        parsed.model, parsed.data, batch_size=images, image_size=parsed.image_size, input_shape=parsed.input_shape
    )
    if parsed.weights:
        load_weights(loaded.model, Path(parsed.weights))
    made, table, converted = _convert(parsed, loaded)
    print(table)
    weights = BytesIO()  # on a full disk torch's own writer aborts the process
    torch.save(converted.state_dict(), weights)
    example = (
        "[torch.rand(3, 96, 96), torch.rand(3, 96, 128)]"
        if isinstance(loaded.images, list)
        else f"torch.randn{(2, *loaded.images.shape[1:])}"
    )
    files: dict[str, str | bytes] = {
        "weights.pt": weights.getvalue(),
        "load.py": LOAD.format(example=example, spec=parsed.model, training=TRAINING[parsed.form]),
        "plan.json": plan_text(made),
        "plan.txt": f"{table}\n",
    }
    write_folder(out, files)
    print(f"Files: {', '.join(str(out / name) for name in files)}")
    print(TRAINING[parsed.form])
    return 0


def _convert(parsed: Any, loaded: ModelAndData) -> tuple[Plan, str, nn.Module]:
    """The plan, its table, and the converted model; warnings as lines of their own."""
    console = Console(stderr=True)
    with console.status("reading the model") as status, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        made = plan(
            loaded.model,
            loaded.example,
            norms=parsed.norms,
            keep=parsed.keep,
            standardize=parsed.standardize,
            warm_start=parsed.warm_start,
            form=parsed.form,
            progress=lambda done, layers: status.update(f"{done} of {layers} layers fitted"),
        )
        converted = made.apply()
        table = str(made)  # states the error of the fit
    for warning in caught:
        console.print(f"warning: {warning.message}", highlight=False, markup=False, soft_wrap=True)
    return made, table, converted


def _parser() -> ArgumentParser:
    parser = command_parser(
        "convert",
        "Remove the norms from a model. Print what happens to each layer and why, and write weights.pt, load.py (which loads "
        "them), plan.json and plan.txt. The kernels are scaled on the images of --data, so that each layer keeps the variance "
        "that its norm gave it. With --warm-start the layers are fitted to what the trained model computes.",
        "pws convert --model timm:resnet18 --weights resnet18.pt --warm-start --data fashion-mnist --out converted",
    )
    parser.add_argument(
        "--model", type=str, required=True, help="torchvision:NAME, timm:NAME or package.module:factory"
    )
    parser.add_argument("--weights", type=str, help="a state dict to start from, written by torch.save or safetensors")
    parser.add_argument(
        "--data",
        type=str,
        default=RANDOM,
        help=f"images of the example: {RANDOM}, {', '.join(DATASETS)}; of a detector: {', '.join(DETECTION_DATASETS)}",
    )
    parser.add_argument(
        "--batch-size", type=int, help="number of images of the example; 32 if left out, 256 with --warm-start"
    )
    parser.add_argument(
        "--image-size", type=int, help="pixels per side; if left out, the data's own, or 224 for random images"
    )
    add_input_shape(parser)
    parser.add_argument(
        "--warm-start", action="store_true", help="keep what the trained model computes, as closely as possible"
    )
    parser.add_argument(
        "--keep", type=str, nargs="+", default=[], help="names or patterns of layers to leave alone: 'layer4.*'"
    )
    parser.add_argument(
        "--standardize",
        type=str,
        nargs="+",
        default=[],
        help="names or patterns of layers to standardize though no norm stands beside them: 'backbone.fpn.*' 'rpn.head.conv.*'",
    )
    parser.add_argument(
        "--norms",
        type=str,
        nargs="+",
        default=["batch"],
        help="families of norms to remove: batch group layer instance",
    )
    parser.add_argument(
        "--form",
        type=str,
        default="optimizer",
        help="optimizer (plain layers with marks, which an optimizer of pws.optim trains) or layers (pws layers)",
    )
    parser.add_argument("--out", type=str, required=True, help="folder to write; it must be new or empty")
    return parser


def _check(parsed: Any, out: Path) -> None:
    check_sizes(parsed)
    check_folder(out.parent)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PwsError(f"--out {out} exists already, and nothing is overwritten. Name another folder, or remove it.")
    if parsed.warm_start and not parsed.weights:
        raise PwsError("--warm-start keeps what a trained model computes; without --weights there is none. Give both.")
    if parsed.data == RANDOM and parsed.warm_start:
        raise PwsError(
            "--warm-start fits the layers to real images; --data is random. Name a dataset: --data fashion-mnist."
        )


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict.

    Raises:
        PwsError: the file holds none, or not of this model.
    """
    try:
        state: Any = _read(path)
        own = {key: value for key, value in model.state_dict().items() if key in state}
        if problems := misfits({key: state[key] for key in own}, own):
            raise TypeError(problems[0])
        model.load_state_dict(state)
    except OSError:
        raise
    except Exception as error:  # a file may hold anything
        raise PwsError(
            f"--weights {path} must be a state dict of the model: {type(error).__name__}: {one_line(error)}. Write it with "
            "torch.save(model.state_dict(), FILE), and build the same model (the same number of classes)."
        ) from error


def _read(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True)
    from safetensors.torch import load_file

    return load_file(path)
