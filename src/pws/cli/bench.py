"""`pws bench`: what a user measures on his own model and data."""

from __future__ import annotations

from typing import Final

from pws._errors import PwsError, nearest
from pws.cli import accuracy, loader, speed

BENCHES: Final = {"accuracy": accuracy.run, "loader": loader.run, "speed": speed.run}
USAGE: Final = """usage: pws bench NAME [options]     (pws bench NAME --help tells the options)

  accuracy  train a grid of methods, learning rates, batch sizes and seeds on your data: pws bench accuracy grid.yaml
  loader    time a recipe's loader beside its training steps: pws bench loader RECIPE
  speed     time your model with its norms, without them and with pws: pws bench speed --model timm:resnet18

The experiments behind the documentation run from a checkout of the repository: python -m benchmarks."""


def run(arguments: list[str]) -> int:
    """Run the bench that is named."""
    name = arguments[0] if arguments else None
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name not in BENCHES:
        said = "pws bench needs a name" if name is None else f"unknown bench {name!r}"
        known = nearest(name or "", BENCHES)
        raise PwsError(f"{said}{known}. The experiments run from a checkout of the repository: python -m benchmarks.")
    return BENCHES[name](arguments[1:])
