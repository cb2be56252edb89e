"""What happened and why, in words made of measured numbers."""

from __future__ import annotations

from pws.demo.runs import CONTROL, LEARNING_RATES, METHOD_ORDER, DemoResult, DemoRun
from pws.optim.bound import STEP_BOUND

Results = dict[DemoRun, DemoResult]


def sentences(results: Results) -> list[str]:
    """What happened, the verdicts on none and pws, the average gradients of all, and what the bounded step does by itself."""
    verdicts = [_verdict(results, "none", "very large"), _verdict(results, "pws", "very large")]
    return [_what(results), *verdicts, _gradients(results), _control(results)]


def _at(results: Results, row: str, rate: str) -> DemoResult:
    return next(result for run, result in results.items() if run.row == row and run.lr == LEARNING_RATES[rate])


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _what(results: Results) -> str:
    ended = {row: _at(results, row, "large") for row in METHOD_ORDER}
    failed = [f"{row} ({result})" for row, result in ended.items() if result.collapsed]
    trained = [f"{row} ({result})" for row, result in ended.items() if not result.collapsed]
    verb = f"{_listed(failed)} collapsed" if failed else "no network collapsed"
    rest = f", while {_listed(trained)} trained" if trained else ""
    return f"At the large learning rate {LEARNING_RATES['large']:g}, {verb}{rest}."


def _verdict(results: Results, row: str, rate: str) -> str:
    return f"{row} at {LEARNING_RATES[rate]:g}: {_at(results, row, rate).verdict}"


def _gradients(results: Results) -> str:
    spans = {}
    for row in METHOD_ORDER:
        ratios = _at(results, row, "large").average_gradients.values()
        low, high = f"{min(ratios):.0f}", f"{max(ratios):.0f}"
        spans[row] = low if low == high else f"{low} to {high}"
    return (
        "In the first step, before anything went wrong, the weights of a filter were pushed alike: the squared average "
        f"gradient was {spans['none']} times that of independent gradients with none ({spans['wn']} with wn, "
        f"{spans['gn']} with gn, {spans['bn']} with bn), and {spans['pws']} with pws, whose kernels no step can shift."
    )


def _control(results: Results) -> str:
    rate = LEARNING_RATES["very large"]
    pws, control = (_at(results, row, "very large") for row in ("pws", CONTROL))
    return (
        f"Each layer's step of pws was bounded to length {STEP_BOUND:g}, its default; to tell the two apart, "
        f"none with the same bound gave {control} at learning rate {rate:g}, pws {pws}."
    )
