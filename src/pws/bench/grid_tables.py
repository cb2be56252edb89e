"""What a grid's cells amount to: mean and spread over seeds, steps to a target, the range of learning rates that trains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from pws.bench.grid import ONLY_COLUMN, cell_settings
from pws.training.guessing import GUESSING_ACCURACY
from pws.training.recipe_file import recipe_of

MASK_AP: Final = "mask_ap"
"""What a cell of a detector with masks holds beside its score."""
VALIDATION: Final = "validation"
"""The score on the validation images, of a cell that has them."""
SHOWN: Final = 0.0005
"""From here on a score is more than 0.0 %."""


@dataclass
class StoredCell:
    """What the tables need of a cell in a result file."""

    row: str
    column: str
    seed: int
    accuracy: float | None
    """The task's score in [0, 1]: accuracy, or average precision of boxes; None if the loss went non-finite."""
    non_finite_step: int | None
    steps_to_target: int | None
    """The step at which the accuracy on the first test images reached the target; None if it did not."""


@dataclass(frozen=True)
class SeedSummary:
    """The seeds of one row and column."""

    accuracies: tuple[float, ...]
    """Those of the seeds that ended, in [0, 1]."""
    non_finite_steps: tuple[int, ...]
    """Those of the seeds that did not end."""
    steps_to_target: float | None
    """Median over the seeds; None if half of them or more never got there."""

    @property
    def mean(self) -> float | None:
        """Mean accuracy over the seeds; None if one of them went non-finite."""
        return None if self.non_finite_steps or not self.accuracies else statistics.fmean(self.accuracies)

    @property
    def trains(self) -> bool:
        """Whether every seed ended above chance."""
        return not self.non_finite_steps and all(accuracy > GUESSING_ACCURACY for accuracy in self.accuracies)

    def __str__(self) -> str:
        """Percent, with the seeds' standard deviation, and nan@k where seeds failed."""
        ended = "" if not self.accuracies else f"{100 * statistics.fmean(self.accuracies):.1f}"
        if len(self.accuracies) > 1:
            ended += f" ± {100 * statistics.stdev(self.accuracies):.1f}"
        if not self.non_finite_steps:
            return ended
        nan = f"nan@{min(self.non_finite_steps)}"
        count = len(self.non_finite_steps)
        return nan if not ended else f"{ended}, {count} of {count + len(self.accuracies)} {nan}"


def over_seeds(result: Mapping[str, Any], figure: str = "accuracy") -> dict[tuple[str, str], SeedSummary]:
    """Row and column to summary of a figure, of a result file's content; columns without the figure are left out."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    known = {cell["column"] for cell in result["cells"] if figure in cell}
    for cell in result["cells"]:
        if cell["column"] in known:
            groups.setdefault((cell["row"], cell["column"]), []).append(cell)
    return {key: _summary(cells, figure) for key, cells in groups.items()}


def settings_of(result: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a cell of a result file, which holds them by row and by column."""
    row, column = cell["row"], cell["column"]
    return cell_settings(result["settings"], result["columns"][column], row, result["rows"][row], cell["seed"])


def _summary(cells: Sequence[Mapping[str, Any]], figure: str) -> SeedSummary:
    middle = statistics.median(
        math.inf if cell["steps_to_target"] is None else cell["steps_to_target"] for cell in cells
    )
    return SeedSummary(
        tuple(cell[figure] for cell in cells if cell.get(figure) is not None),  # a run that failed may have none
        tuple(cell["non_finite_step"] for cell in cells if cell["non_finite_step"] is not None),
        middle if math.isfinite(middle) else None,
    )


def mask_table(result: Mapping[str, Any]) -> str:
    """The average precision of masks, of the columns that have it; empty if none has."""
    return accuracy_table(result, MASK_AP)


def accuracy_table(result: Mapping[str, Any], figure: str = "accuracy") -> str:
    """Markdown: rows by columns of the task's score, or of another figure; the best of each column in bold."""
    summaries = over_seeds(result, figure)
    shown = [c for c in _columns(result) if any((r, c) in summaries for r in result["rows"])]
    if not shown:
        return ""
    best = {c: max(summaries[r, c].mean or 0 for r in result["rows"] if (r, c) in summaries) for c in shown}
    best = {c: mean for c, mean in best.items() if mean >= SHOWN}

    def text(row: str, column: str) -> str:
        summary = summaries.get((row, column))
        if summary is None:
            return "-"
        return f"**{summary}**" if summary.mean is not None and summary.mean == best.get(column) else str(summary)

    return _markdown(result, text, shown)


def steps_table(result: Mapping[str, Any]) -> str:
    """Markdown: the median step at which the accuracy on the first test images reached the target."""
    summaries = over_seeds(result)

    def text(row: str, column: str) -> str:
        summary = summaries.get((row, column))
        return "-" if summary is None or summary.steps_to_target is None else f"{summary.steps_to_target:g}"

    return _markdown(result, text, _columns(result))


def range_table(result: Mapping[str, Any]) -> str:
    """Markdown: the widest range of neighbouring learning rates at which every seed trained, for each network and batch
    size of several rates; empty if there is none."""
    groups = {group: rates for group, rates in rates_of(result).items() if len(rates) > 1}
    if not groups:
        return ""
    summaries = over_seeds(result)
    lines = _head(["method", *groups])
    for row in result["rows"]:
        ranges = []
        for rates in groups.values():
            judged = [(lr, summaries[row, column].trains) for lr, column in rates if (row, column) in summaries]
            ranges.append(_widest(judged))
        lines.append(f"| {row} | " + " | ".join(ranges) + " |")
    return "\n".join(lines) + "\n"


def rate_table(result: Mapping[str, Any]) -> str:
    """Markdown: the score at the learning rate that is each method's best, by network and batch size of several rates; empty
    if there is none. The validation images choose the rate; where a grid holds none out, the test images."""
    groups = {group: rates for group, rates in rates_of(result).items() if len(rates) > 1}
    if not groups:
        return ""
    summaries = over_seeds(result)
    judged = over_seeds(result, VALIDATION) or summaries
    found = {
        (row, group): (lr, summaries[row, column])
        for row, (group, rates) in product(result["rows"], groups.items())
        for lr, column in _best_rate(row, rates, judged)
    }

    def text(row: str, group: str) -> str:
        if (row, group) not in found:
            return "-"
        lr, summary = found[row, group]
        best = max(other.mean or 0 for (_, its_group), (_, other) in found.items() if its_group == group)
        bold = "**" if summary.mean == best and best >= SHOWN else ""
        return f"{bold}{summary}{bold} (LR {lr:g})"

    return _markdown(result, text, list(groups))


def _best_rate(
    row: str, rates: Sequence[tuple[float, str]], judged: Mapping[tuple[str, str], SeedSummary]
) -> list[tuple[float, str]]:
    """The rate with the largest mean, with its column; none for a row without a cell."""
    means = {(lr, column): judged[row, column].mean for lr, column in rates if (row, column) in judged}
    return sorted(means, key=lambda rate: -1.0 if means[rate] is None else means[rate])[-1:]  # type: ignore[arg-type, return-value]


def rates_of(result: Mapping[str, Any]) -> dict[str, list[tuple[float, str]]]:
    """Network, batch size and what else tells columns apart, to learning rates, in order, each with its column."""
    groups: dict[str, dict[float, str]] = {}
    for cell in result["cells"]:
        recipe = recipe_of(settings_of(result, cell))
        parts = [recipe.model.name, f"batch {recipe.data.batch_size}"]
        told = [] if cell["column"] in ONLY_COLUMN.values() else cell["column"].split(", ")
        parts += [part for part in told if part not in parts and not part.startswith("LR ")]
        groups.setdefault(", ".join(parts), {})[recipe.optim.lr] = cell["column"]
    return {group: sorted(rates.items()) for group, rates in groups.items()}


def _widest(judged: Sequence[tuple[float, bool]]) -> str:
    best: list[float] = []
    run: list[float] = []
    for lr, trains in judged:
        run = [*run, lr] if trains else []
        if len(run) > len(best):
            best = run
    if not best:
        return "none"
    return f"{best[0]:g}" if len(best) == 1 else f"{best[0]:g} to {best[-1]:g}"


def _columns(result: Mapping[str, Any]) -> list[str]:
    present = {cell["column"] for cell in result["cells"]}
    return [column for column in result["columns"] if column in present]


def _head(titles: Iterable[str]) -> list[str]:
    titles = list(titles)
    return ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]


def _markdown(result: Mapping[str, Any], text: Callable[[str, str], str], columns: Sequence[str]) -> str:
    present = {cell["row"] for cell in result["cells"]}
    lines = _head(["method", *columns])
    for row in result["rows"]:
        if row in present:
            lines.append(f"| {row} | " + " | ".join(text(row, column) for column in columns) + " |")
    return "\n".join(lines) + "\n"
