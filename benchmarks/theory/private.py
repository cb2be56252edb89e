"""What private training gains by taking the average gradient out before it clips, and what a projection takes of the noise."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.experiment import PROGRAM, Say, run_experiment
from benchmarks.theory.divergence import Network, prepare, sgd_of
from pws._mark import marked
from pws.bench.plotting import new_figure, save_figure
from pws.bench.result_file import Result, rounded, write_result

NETWORKS: Final = (
    *(Network("stack4", "pws", 0.5, 128), Network("allconv", "pws", 0.25, 128)),
    *(Network("cifar-resnet18", "pws", 0.125, 128), Network("wrn16-4", "pws", 0.25, 128)),
)
STEPS: Final = 100
LR: Final = 0.1


def run(arguments: list[str]) -> int:
    """Measure the gradients of single images."""
    line = f"Take the gradient of each image of a batch, before training and after {STEPS} steps."
    return run_experiment("private", line, measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Write private.json and private.png."""
    rows = []
    for network in NETWORKS[:2] if quick else NETWORKS:
        row = shares(network, quick)
        rows.append({"network": network.model, "width": network.width, **row})
        say(
            f"{network.model} x {network.width:g}: the average gradient is {100 * row['before']:.0f} % of an image's squared "
            f"gradient before training, {100 * row['after']:.0f} % after; of the noise it is {100 * row['noise']:.1f} %"
        )
    draw(write_result(out / "private.json", f"{PROGRAM} private", {"private": rows}), out / "private.png")


def shares(network: Network, quick: bool) -> dict[str, float]:
    """The average gradient's share of the squared norm, of single images' gradients of kernels and of noise."""
    model, loader = prepare(network, "digits" if quick else "fashion-mnist")
    batches = iter(loader)
    images, labels = next(batches)
    optimizer = sgd_of(model, LR, step_bound=0.03)
    optimizer.zero_grad()
    found = {"before": image_share(model, images, labels)}
    for _ in range(3 if quick else STEPS):
        inputs, targets = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    found["after"] = image_share(model, images, labels)
    torch.manual_seed(0)
    found["noise"] = _share([torch.randn(1, *kernel.shape) for kernel in kernels_of(model)])
    return {name: rounded(share) for name, share in found.items()}


def image_share(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The mean over the images."""
    import_module("pws.private")  # its sampler is right in these images' memory format, which Opacus' own is not
    from opacus.grad_sample import GradSampleHooks

    hooks = GradSampleHooks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        F.cross_entropy(model(images), labels).backward()
    samples: list[Any] = [kernel.grad_sample for kernel in kernels_of(model)]  # type: ignore[attr-defined]
    share = _share(samples)
    hooks.cleanup()
    model.zero_grad()
    return share


def kernels_of(model: nn.Module) -> list[nn.Parameter]:
    """The standardized kernels."""
    return [model.get_submodule(name).get_parameter("weight") for name in marked(model)]


def _share(gradients: list[Tensor]) -> float:
    """`sum over filters of n mean(G_o)^2`, over `|G|^2`, of each image, all layers together."""
    flat = [gradient.flatten(2) for gradient in gradients]  # (B, O, n)
    average = torch.stack([(g.mean(2).square() * g.shape[2]).sum(1) for g in flat]).sum(0)
    whole = torch.stack([g.square().sum((1, 2)) for g in flat]).sum(0)
    return float((average / whole).mean())


def private_table(result: Result) -> str:
    """A row per network."""
    lines = ["| network | image, before training | image, after | noise |", "| --- | ---: | ---: | ---: |"]
    for row in result["private"]:
        numbers = " | ".join(f"{100 * row[key]:.1f}" for key in ("before", "after", "noise"))
        lines.append(f"| {row['network']} x {row['width']:g} | {numbers} |")
    return "\n".join(lines)


def draw(result: Result, path: Path) -> None:
    """Bars per network."""
    figure = new_figure(7, 3.5)
    axes, rows = figure.subplots(), result["private"]
    names = {"before": "an image's gradient, before training", "after": "after", "noise": "noise"}
    for number, (key, name) in enumerate(names.items()):
        places = [i + 0.27 * (number - 1) for i in range(len(rows))]
        axes.bar(places, [100 * row[key] for row in rows], 0.25, label=name)
    axes.set_xticks(range(len(rows)), [f"{row['network']} x {row['width']:g}" for row in rows])
    axes.set_ylabel("average gradient, % of the squared norm")
    axes.set_ylim(0, 130)
    axes.legend(loc="upper right")
    save_figure(figure, path)
