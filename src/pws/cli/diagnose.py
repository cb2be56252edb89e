"""`pws diagnose`: why a network collapses, or would."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from pws._errors import PwsError
from pws.cli.arguments import add_force, add_input_shape, check_free, check_sizes, command_parser, parse
from pws.diagnosis import Diagnosis, Forecast, diagnose, forecast
from pws.diagnosis.report import require_plotly
from pws.training.model_and_data import RANDOM, ModelAndData, load_model, load_run
from pws.training.quiet import quiet_lightning


def run(arguments: list[str]) -> int:
    """Parse, diagnose, print."""
    parser = command_parser(
        "diagnose",
        "Explain a network layer by layer on one training batch: variance transmission, the shift of the average gradient, "
        "critical learning rates, and a verdict. Give a run's folder, one of its checkpoints, a recipe, or --model.",
        "pws diagnose fashion-mnist-allconv-bn --lr 3 --out report.html; pws diagnose --model timm:resnet18 --lr 0.5",
    )
    parser.add_argument("run", type=str, nargs="?", help="a run's folder, RUN/checkpoints/FILE.ckpt, or a recipe")
    parser.add_argument("--model", type=str, help="torchvision:NAME, timm:NAME or package.module:factory")
    parser.add_argument(
        "--checkpoint", type=str, default="last", help="which checkpoint of a run's folder: last, best or init"
    )
    parser.add_argument("--data", type=str, help="(--model) a dataset's name, or random, the default")
    parser.add_argument("--root", type=str, help="(--model) the dataset's folder")
    parser.add_argument("--image-size", type=int, help="(--model) pixels per side; 224 for random images")
    add_input_shape(parser)
    parser.add_argument("--batch-size", type=int, help="number of images; if left out, the recipe's, or 32")
    parser.add_argument("--lr", type=float, help="the learning rate to judge; if left out, the recipe's")
    parser.add_argument("--momentum", type=float, help="momentum of SGD; if left out, the recipe's")
    parser.add_argument(
        "--steps", type=int, default=1, help="number of steps ahead for which the shift share is predicted"
    )
    parser.add_argument(
        "--forecast",
        action="store_true",
        help="also forecast the learning rate at which training diverges (about 180 more passes; it needs real images)",
    )
    parser.add_argument("--out", type=str, help="write the report here: .html, or .png for its main charts")
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parsed = parse(parser, arguments)
    out = _checked_out(parsed.out, force=parsed.force)
    quiet_lightning()
    loaded = _load(parsed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.to(device)
    diagnosis = diagnose(
        loaded.model,
        loaded.batch,
        loaded.loss,
        lr=loaded.lr if parsed.lr is None else parsed.lr,
        momentum=loaded.momentum if parsed.momentum is None else parsed.momentum,
        steps=parsed.steps,
    )
    predicted = _forecast(loaded) if parsed.forecast else None
    _show(loaded, diagnosis, predicted, out, as_json=parsed.json)
    return 0


def _forecast(loaded: ModelAndData) -> Forecast:
    if loaded.labels is None:
        raise PwsError("--forecast needs images with labels: give --data the name of a dataset, such as --data digits.")
    batches = [(loaded.images, loaded.labels), *loaded.more]
    if len(batches) < 2:
        raise PwsError("--forecast needs two training batches or more, and the data has one. Lower --batch-size.")
    with Console(stderr=True).status("forecast") as status:
        return forecast(
            loaded.model,
            batches[: len(batches) // 2 * 2],
            loaded.loss,
            progress=lambda done: status.update(f"forecast: {done} passes of about {60 * (len(batches) // 2)}"),
        )


def _checked_out(given: str | None, *, force: bool) -> Path | None:
    out = None if given is None else Path(given)
    if out is not None and out.suffix not in (".html", ".png"):
        raise PwsError(f"--out ends with .html or .png; got {given!r}.")
    if out is not None:
        check_free(out, force=force)
    if out is not None and out.suffix == ".html":
        require_plotly()
    return out


def _load(parsed: Any) -> ModelAndData:
    if (parsed.run is None) == (parsed.model is None):
        raise PwsError(
            "give either a run (its folder, a checkpoint, or a recipe) or --model; got "
            f"{'neither' if parsed.run is None else 'both'}. `pws diagnose --help` shows examples."
        )
    check_sizes(parsed)
    if parsed.model is not None:
        settings = {"root": parsed.root, "batch_size": parsed.batch_size or 32, "image_size": parsed.image_size}
        settings["input_shape"] = parsed.input_shape
        return load_model(parsed.model, parsed.data or RANDOM, **settings)
    given = [flag for flag in ("data", "root", "image_size", "input_shape") if getattr(parsed, flag) is not None]
    if given:
        flag = given[0].replace("_", "-")
        raise PwsError(f"--{flag} goes with --model: a run has its recipe's data. Leave it out, or change the recipe.")
    return load_run(parsed.run, parsed.checkpoint, parsed.batch_size)


def _finite(value: Any) -> Any:
    """Infinity (no rate found) as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(
    loaded: ModelAndData, diagnosis: Diagnosis, predicted: Forecast | None, out: Path | None, *, as_json: bool
) -> None:
    if out is not None:
        if out.suffix == ".png":
            diagnosis.png(out)
        else:
            diagnosis.html(out, title=loaded.title)
    if as_json:
        extra = {} if predicted is None else {"forecast": _finite(asdict(predicted))}
        print(json.dumps({**diagnosis.to_dict(), **extra}, indent=2, allow_nan=False))
        return
    console = Console()
    settings = diagnosis.settings
    judged = "" if settings.lr is None else f", learning rate {settings.lr:g}, momentum {settings.momentum:g}"
    console.print(f"{loaded.title}: batch of {len(loaded.images)}{judged}", highlight=False, soft_wrap=True)
    console.print(diagnosis.table())
    console.print(Text.assemble((f"{diagnosis.verdict.cause}: ", "bold"), str(diagnosis.verdict)))
    if diagnosis.unused:
        console.print(f"did not run: {', '.join(diagnosis.unused)}", markup=False, highlight=False)
    if predicted is not None:
        low, high = min(predicted.by_pair), max(predicted.by_pair)
        console.print(
            f"forecast: SGD with momentum 0.9 is expected to diverge around learning rate {predicted.diverging_lr:.2g} "
            f"({low:.2g} to {high:.2g} from {len(predicted.by_pair)} pairs of batches; "
            "docs/explanation/collapse.md says how sure that is)",
            highlight=False,
        )
    if out is not None:
        console.print(f"\nReport: {out}", markup=False, highlight=False, soft_wrap=True)
