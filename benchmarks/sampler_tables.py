"""The tables of `python -m benchmarks samplers`, which need no Opacus."""

from __future__ import annotations

from typing import Final

from pws.bench.result_file import Result

MIB: Final = 2**20


def hooks_table(result: Result) -> str:
    """Gradients per sample."""
    return _table(result, "hooks")


def ghost_table(result: Result) -> str:
    """Norms per sample."""
    return _table(result, "ghost")


def _table(result: Result, mode: str) -> str:
    """The time of each row beside the first one's, and the peak of memory."""
    cases = {case: modes[mode] for case, modes in result["samplers"].items()}
    rows = list(next(iter(cases.values())))
    lines = [f"| | {' | '.join(rows)} |", "| --- |" + " --- |" * len(rows)]
    for case, costs in cases.items():
        cells = [f"{costs[row]['ratio'][1]:.2f}, {costs[row]['peak'] / MIB:.0f} MiB" for row in rows]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)
