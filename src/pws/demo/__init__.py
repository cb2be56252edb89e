"""The demonstration behind `pws demo`: five methods at three learning rates on real images."""

from pws.demo.plot import draw
from pws.demo.runs import CONTROL, LEARNING_RATES, METHOD_ORDER, DemoResult, DemoRun, all_runs, train_run
from pws.demo.story import sentences

__all__ = [
    "CONTROL",
    "LEARNING_RATES",
    "METHOD_ORDER",
    "DemoResult",
    "DemoRun",
    "all_runs",
    "draw",
    "sentences",
    "train_run",
]
