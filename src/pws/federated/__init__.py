"""Federated training with Flower: clients keep their images, a server averages their weights. Needs the extra `federated`."""

try:
    import flwr as _flwr  # noqa: F401
except ImportError as _error:
    from pws._errors import PwsError as _PwsError

    raise _PwsError("pws.federated needs Flower: pip install 'pws-torch[federated]'.") from _error

from pws.federated.results import FederatedSummary
from pws.federated.run import federate
from pws.federated.server import NobodyLeftError
from pws.federated.simulation import Simulation

__all__ = ["FederatedSummary", "NobodyLeftError", "Simulation", "federate"]
