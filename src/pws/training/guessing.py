"""Where learning begins: what a network that guesses among ten classes gets."""

from __future__ import annotations

import math
from typing import Final

GUESSING_ACCURACY: Final = 0.2
"""Below this accuracy a network of ten classes has learnt nothing."""
GUESSING_LOSS: Final = 0.95 * math.log(10)
"""The cross-entropy of about a uniform guess among ten classes."""
