"""All models, in parallel processes, each stored when it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pws.bench.apart import Failure, each_apart
from pws.bench.conversion.check import LR, STEPS, Checked, check_model
from pws.bench.result import commit, read_result, write_result

Stored = dict[str, Any]


def run_conversions(
    specs: Sequence[str], path: Path, command: str, jobs: int, listen: Callable[[str, Stored, int], None]
) -> Stored:
    """Check what `path` does not hold yet; returns the content of `path`.

    `listen` is given a model's name, what became of it, and how many are done. A model whose process dies has that failure.
    """
    known: dict[str, Stored] = (read_result(path, "models", dict, Checked) or {"models": {}})["models"]
    done = {spec: known[spec] for spec in specs if spec in known}
    tasks = {spec: (spec,) for spec in specs if spec not in done}
    for spec, outcome in each_apart(check_model, tasks, jobs):
        checked = Checked(0, failures=[outcome.reason], commit=commit()) if isinstance(outcome, Failure) else outcome
        done[spec] = asdict(checked)
        _write(specs, path, command, done)
        listen(spec, done[spec], len(done))
    return _write(specs, path, command, done)


def _write(specs: Sequence[str], path: Path, command: str, done: dict[str, Stored]) -> Stored:
    models = {spec: done[spec] for spec in specs if spec in done}
    run = [model for model in models.values() if not model["not_run"]]
    passed = sum(not model["failures"] for model in run)
    content = {"steps": STEPS, "lr": LR, "run": len(run), "passed": passed, "models": models}
    return write_result(path, command, content)


def conversions_table(result: Stored) -> str:
    """Markdown: a line a model."""
    lines = [
        "| model | parameters | standardized | norms removed | kept | loss, first and last step | fold differs by | failures |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for spec, model in result["models"].items():
        losses, fold = model["losses"], model["fold_difference"]
        cells = [
            spec,
            f"{model['parameters'] / 1e6:.2f} M",
            str(model["standardized"]),
            str(model["removed"]),
            str(len(model["kept_norms"])),
            f"{losses[0]:.3g}, {losses[-1]:.3g}" if losses else "-",
            "-" if fold is None else f"{fold:.0e}",
            "; ".join(model["failures"]) or (f"not run: {model['not_run']}" if model["not_run"] else "none"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def conversions_summary(result: Stored) -> str:
    """Markdown: a line a library, with the models that failed."""
    lines = ["| library | models | run | passed | failed | not run |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for library in dict.fromkeys(spec.partition(":")[0] for spec in result["models"]):
        models = {spec: m for spec, m in result["models"].items() if spec.startswith(f"{library}:")}
        idle = [spec for spec, model in models.items() if model["not_run"]]
        failed = [spec for spec, model in models.items() if model["failures"]]
        run = len(models) - len(idle)
        names = [", ".join(spec.partition(":")[2] for spec in specs) or "-" for specs in (failed, idle)]
        lines.append(f"| {library} | {len(models)} | {run} | {run - len(failed)} | {' | '.join(names)} |")
    return "\n".join(lines) + "\n"
