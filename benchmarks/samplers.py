"""What gradients per sample, and their norms, cost in Opacus: with its own samplers, those of `pws.private`, and functorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping, get_gsm_class
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

import pws
import pws.private
from benchmarks.experiment import PROGRAM, Say, run_experiment
from benchmarks.sampler_tables import MIB
from pws.bench.plotting import new_figure, save_figure
from pws.bench.result_file import read_result, write_result
from pws.bench.timers import TimedStep, TimerHere
from pws.bench.timing import costs, measure_rounds, ratio_text
from pws.bench.timing import measure as measure_steps

SETTINGS: Final = {"batch": 64, "seconds": 15.0, "processes": 2}
QUICK: Final = {"batch": 4, "seconds": 0.0, "processes": 0}


@dataclass(frozen=True)
class Case:
    """A network of convolutions, and the images that it takes."""

    widths: tuple[int, ...]
    """Channels of the images, then of each convolution's output."""
    strides: tuple[int, ...]
    kernel: int
    pixels: int


@dataclass
class StoredCase:
    """A case in samplers.json: by mode and row, the costs."""

    hooks: dict[str, Any]
    ghost: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """Layers, and the samplers that serve them."""

    room: str
    """Whose Conv2d: torch.nn or pws."""
    ours: bool
    """With the samplers of `pws.private`; else as Opacus is without them."""


CASES: Final = {
    "3x3, 64 channels, 28 px": Case((64, 64), (1,), 3, 28),
    "3x3, 256 channels, 7 px": Case((256, 256), (1,), 3, 7),
    "1x1, 256 channels, 14 px": Case((256, 256), (1,), 1, 14),
    "3 convolutions, 16 to 32 channels, 28 px": Case((1, 16, 32, 32), (2, 2, 1), 3, 28),
    "6 convolutions, 32 to 128 channels, 28 px": Case((1, 32, 32, 64, 64, 128, 128), (1, 1, 2, 1, 2, 1), 3, 28),
}
QUICK_CASES: Final = {"2 convolutions": Case((2, 4, 16), (1, 3), 3, 6)}
ROWS: Final[dict[str, dict[str, Row]]] = {
    "hooks": {
        "Conv2d, Opacus": Row("torch.nn", False),
        "pws.Conv2d, pws.private": Row("pws", True),
        "pws.Conv2d, functorch": Row("pws", False),
    },
    "ghost": {
        "Conv2d, Opacus": Row("torch.nn", False),
        "Conv2d, pws.private": Row("torch.nn", True),
        "pws.Conv2d, gradients": Row("pws", False),
        "pws.Conv2d, pws.private": Row("pws", True),
    },
}
"""By Opacus' mode; the first row is what the others are measured beside."""


def run(arguments: list[str]) -> int:
    """Measure the samplers."""
    line = "Forward and backward pass with gradients per sample, or their norms: Opacus, pws.private and functorch."
    return run_experiment("samplers", line, measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Go on with what an interrupted samplers.json holds; write it and samplers.png."""
    path, (cases, settings) = out / "samplers.json", (QUICK_CASES, QUICK) if quick else (CASES, SETTINGS)
    found = _interrupted(path, cases, settings)
    for name, case in cases.items():
        if name in found:
            continue
        modes = {}
        for mode in ROWS:
            check_parity(case, mode)
            modes[mode] = timed = _timed(case, mode, settings)
            for row, cost in timed.items():
                say(f"{name}, {mode}, {row}: {ratio_text(cost['ratio'])}, peak {cost['peak'] / MIB:.1f} MiB")
        found[name] = modes
        write_result(path, f"{PROGRAM} samplers", {"settings": settings, "samplers": found})
    _draw(found, out / "samplers.png")


def _interrupted(path: Path, cases: Mapping[str, Case], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The cases in the file at `path`; none if it holds all of them, which are then timed anew."""
    stored = read_result(path, "samplers", dict, StoredCase) or {"samplers": {}}
    found: dict[str, dict[str, Any]] = stored["samplers"]
    return found if stored.get("settings") == settings and found.keys() < cases.keys() else {}


def _timed(case: Case, mode: str, settings: dict[str, Any]) -> dict[str, Any]:
    builders = {row: partial(build_step, case, mode, row, settings["batch"]) for row in ROWS[mode]}
    if settings["processes"]:
        timings = measure_steps(mode, builders, settings["seconds"], settings["processes"], _ignore)
    else:  # new processes would import torch for longer than a quick look takes
        timings = measure_rounds(mode, {row: TimerHere(build) for row, build in builders.items()}, 0.0, _ignore)
    return {row: asdict(cost) for row, cost in costs(timings, next(iter(builders))).items()}


def _ignore(_: str) -> None:
    """What `measure` says of its progress."""


def build_step(case: Case, mode: str, row: str, batch: int) -> TimedStep:
    """A step without its optimizer: what the samplers take part in."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = network(case, ROWS[mode][row].room).to(device)
    images = torch.randn(batch, case.widths[0], case.pixels, case.pixels, device=device, requires_grad=True)
    with samplers_of(row, mode):
        sampled = get_gsm_class(mode)(model)
    backward = _hooked if mode == "hooks" else _ghost

    def step() -> None:
        sampled.zero_grad()
        images.grad = None
        with samplers_of(row, mode):
            backward(sampled, sampled(images).square().flatten(1).sum(1))

    # Functorch allows no watching of what is kept while it runs, in the backward pass.
    return TimedStep(step, sampled, forward=lambda: sampled(images))


def network(case: Case, room: str) -> nn.Sequential:
    """The convolutions, a ReLU between them."""
    kind: Any = {"torch.nn": nn, "pws": pws}[room].Conv2d
    sizes = zip(case.widths, case.widths[1:], case.strides, strict=False)
    layers = [kind(wide, out, case.kernel, stride, case.kernel // 2) for wide, out, stride in sizes]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]


@contextmanager
def samplers_of(row: str, mode: str) -> Iterator[None]:
    """Hide ours from Opacus where a row does without."""
    hooks, ghost = GradSampleHooks.GRAD_SAMPLERS, GradSampleHooksFastGradientClipping.NORM_SAMPLERS
    registry, ours = (hooks, (pws.Conv2d,)) if mode == "hooks" else (ghost, (pws.Conv2d, nn.Conv2d))
    with patch.dict(registry):
        for kind in () if ROWS[mode][row].ours else ours:
            del registry[kind]
        yield


def _hooked(_: nn.Module, losses_B: Tensor) -> None:
    losses_B.mean().backward()


def _ghost(sampled: Any, losses_B: Tensor) -> None:
    sampled.enable_hooks()
    DPTensorFastGradientClipping(sampled, sampled, losses_B).backward()
    sampled.enable_hooks()


def check_parity(case: Case, mode: str) -> None:
    """Raise `AssertionError` unless all rows of the same layers find the same norms."""
    found: dict[str, list[Tensor]] = {}
    for row, settings in ROWS[mode].items():
        step = build_step(case, mode, row, 4)
        step.run()
        found.setdefault(settings.room, []).append(norms_of(step.model, mode))
    for first, *others in found.values():
        assert all(torch.allclose(first, other, rtol=1e-3) for other in others), (case, mode, found)


def norms_of(sampled: Any, mode: str) -> Tensor:
    """The norm of each sample's gradient in all parameters, `(B,)`."""
    if mode == "ghost":
        return torch.as_tensor(sampled.per_sample_gradient_norms)
    norms: Tensor = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in sampled.parameters()]).norm(dim=0)
    return norms


def _draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure = new_figure(9, 3 + len(found))
    for axes, mode in zip(figure.subplots(1, 2, sharey=True), ROWS, strict=True):
        for number, row in enumerate(ROWS[mode]):
            middles = [modes[mode][row]["ratio"][1] for modes in found.values()]
            axes.barh([place + 0.2 * number for place in range(len(found))], middles, height=0.2, label=row)
        axes.set_yticks([place + 0.3 for place in range(len(found))], list(found))
        axes.set_xlabel(f"time beside Conv2d in Opacus, {mode}")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save_figure(figure, path)
