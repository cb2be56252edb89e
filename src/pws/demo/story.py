"""What happened and why, in three sentences made of measured numbers."""

from __future__ import annotations

from pws.demo.cells import CONTROL, LEARNING_RATES, METHOD_ORDER, STEP_BOUND, Cell, Outcome

Results = dict[Cell, Outcome]
Gradients = dict[str, dict[str, float]]


def sentences(results: Results, gradients: Gradients) -> list[str]:
    """Three sentences: what happened, the average gradients behind it, and what the bounded step does by itself."""
    return [_what(results), _why(results, gradients), _control(results)]


def _at(results: Results, row: str, rate: str) -> Outcome:
    return next(o for cell, o in results.items() if cell.row == row and cell.lr == LEARNING_RATES[rate])


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _what(results: Results) -> str:
    outcomes = {row: _at(results, row, "large") for row in METHOD_ORDER}
    failed = [f"{row} ({outcome})" for row, outcome in outcomes.items() if outcome.collapsed]
    trained = [f"{row} ({outcome})" for row, outcome in outcomes.items() if not outcome.collapsed]
    verb = f"{_listed(failed)} collapsed" if failed else "no network collapsed"
    rest = f", while {_listed(trained)} trained" if trained else ""
    return f"At the large learning rate {LEARNING_RATES['large']:g}, {verb}{rest}."


def _why(results: Results, gradients: Gradients) -> str:
    spans = {method: (min(layers.values()), max(layers.values())) for method, layers in gradients.items()}
    layer = max(gradients["none"], key=gradients["none"].__getitem__)
    none, pws = (_at(results, method, "very large").variances for method in ("none", "pws"))
    last = min(len(none), len(pws)) - 1
    return (
        "In the first step of none the weights of a filter were pushed alike, which shifts its mean: the squared average "
        f"gradient was {spans['none'][0]:.0f} to {spans['none'][1]:.0f} times that of independent gradients (most in {layer}; "
        f"wn {spans['wn'][0]:.0f} to {spans['wn'][1]:.0f}, bn {spans['bn'][0]:.0f} to {spans['bn'][1]:.0f}, "
        f"pws {spans['pws'][1]:.0f}), and by step {last} at learning rate {LEARNING_RATES['very large']:g} the variance of the "
        f"network's output had gone from {none[0]:.2g} to {none[last]:.2g} with none, "
        f"from {pws[0]:.2g} to {pws[last]:.2g} with pws."
    )


def _control(results: Results) -> str:
    rate = LEARNING_RATES["very large"]
    pws, control = (_at(results, row, "very large") for row in ("pws", CONTROL))
    return (
        f"The step of pws was bounded to length {STEP_BOUND:g}, as in its Fashion-MNIST recipe; to tell the two apart, "
        f"none with the same bound gave {control} at learning rate {rate:g}, pws {pws}."
    )
