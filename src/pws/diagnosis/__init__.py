"""What is wrong with a network, layer by layer."""

from pws.diagnosis.average_gradient import average_gradient_ratio
from pws.diagnosis.non_finite import first_non_finite

__all__ = ["average_gradient_ratio", "first_non_finite"]
