"""What is wrong with a network, layer by layer."""

from pws.diagnosis._diagnose import diagnose
from pws.diagnosis._first_non_finite import first_non_finite
from pws.diagnosis._forecast import Forecast, forecast
from pws.diagnosis.average_gradient import average_gradient_ratio
from pws.diagnosis.diagnosis import Diagnosis
from pws.diagnosis.health_history import CollapseWarning
from pws.diagnosis.layer import Filters, LayerDiagnosis, Signal
from pws.diagnosis.measurement import Settings
from pws.diagnosis.monitor import Monitor
from pws.diagnosis.verdicts import Verdict

__all__ = [
    "CollapseWarning",
    "Diagnosis",
    "Filters",
    "Forecast",
    "LayerDiagnosis",
    "Monitor",
    "Settings",
    "Signal",
    "Verdict",
    "average_gradient_ratio",
    "diagnose",
    "first_non_finite",
    "forecast",
]
