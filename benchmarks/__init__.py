"""The experiments and measurements behind the documentation, with their results: `python -m benchmarks`."""

from pathlib import Path
from typing import Final

from pws._error_messages import note_own_code

ROOT: Final = Path(__file__).parent
RESULTS: Final = ROOT / "results"
QUICK: Final = RESULTS / "quick"
"""Where --quick writes, which git ignores."""

note_own_code(ROOT)
