"""The demonstration behind `pws demo`: five methods at three learning rates on real images."""

from pws.demo.cells import CONTROL, LEARNING_RATES, METHOD_ORDER, Cell, Outcome, all_cells, run_cell
from pws.demo.picture import draw
from pws.demo.story import sentences

__all__ = [
    "CONTROL",
    "LEARNING_RATES",
    "METHOD_ORDER",
    "Cell",
    "Outcome",
    "all_cells",
    "draw",
    "run_cell",
    "sentences",
]
