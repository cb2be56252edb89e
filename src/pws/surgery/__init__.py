"""Changes to a model as a whole: calibration from data, folding."""

from pws.surgery.calibrate import Calibrated, calibrate
from pws.surgery.fold import fold

__all__ = ["Calibrated", "calibrate", "fold"]
