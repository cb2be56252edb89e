"""Changes to a model as a whole: calibration from data."""

from pws.surgery.calibrate import Calibrated, calibrate

__all__ = ["Calibrated", "calibrate"]
