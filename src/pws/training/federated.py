"""The part of a recipe that deals its images out to clients: `pws federate` trains it, with Flower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from pws._errors import PwsError
from pws.training.rules import AT_LEAST_ONE, POSITIVE, Rule, check_only, check_rules

PART: Final[Rule] = ("above 0, and at most 1", lambda value: 0 < value <= 1)
FEDERATED_RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(("clients", "rounds", "local_epochs", "local_steps"), AT_LEAST_ONE),
    **dict.fromkeys(("alpha", "proximal_mu", "server_lr"), POSITIVE),
    "participation": PART,
}
UNLIKE_CLIENTS: Final[dict[str, tuple[Any, str]]] = {
    "task": ("classify", "it is built for classifiers"),
    "model.calibrate": ("none", "the images are with the clients, and the weights must be the same for all of them"),
    "optim.ema": (None, "each round averages the weights anyway"),
    "trainer.accumulate": (1, "a client's batch is small"),
    "trainer.max_steps": (None, "federated.rounds ends the run"),
    "trainer.early_stop": (None, "federated.rounds ends the run"),
    "trainer.checkpoint_steps": (None, "a checkpoint is stored after each round"),
    "trainer.compile": (False, "clients share one process"),
    "trainer.checkpoint_activations": (False, "a client's batch is small"),
    "trainer.logger": (None, "metrics.csv has the numbers of each round"),
    "trainer.num_nodes": (1, "it runs on one machine"),
    "trainer.strategy": ("auto", "each client trains in one process"),
}
"""Settings with the only value that a federated run takes, and why."""


@dataclass(frozen=True)
class FederatedConfig:
    """Federated training (`pws federate`): clients train on images of their own, and a server averages their weights.

    Args:
        clients: number of clients among which the training images are divided; pws federate takes 10 if it is left out.
        rounds: rounds of local training and averaging. The learning rate's schedule counts rounds as its epochs.
        local_epochs: passes over its own images that a client makes per round.
        local_steps: steps that a client takes per round, in place of local_epochs.
        participation: part of the clients that train in a round, drawn by the seed.
        alpha: label skew: each class is divided by shares drawn from Dirichlet(alpha), so that 0.1 leaves a client few
            classes. null divides all images at random in equal parts.
        skew: feature skew: rotate turns the images of client k of K by 90 k / K degrees; dark darkens them, down to a fifth
            for the last client; domains leaves, inverts, blurs or adds noise to them, one after the other.
        strategy: how the server averages, Flower's: fedavg, fedprox or fedadam.
        proximal_mu: (fedprox) weight of the squared distance to the received weights in a client's loss, halved.
        server_lr: (fedadam) learning rate of the server.
        personal_norms: norms stay with their client, parameters and statistics; with method bn this is FedBN.
    """

    clients: int | None = None
    rounds: int = 30
    local_epochs: int = 1
    local_steps: int | None = None
    participation: float = 1.0
    alpha: float | None = None
    skew: Literal["none", "rotate", "dark", "domains"] = "none"
    strategy: Literal["fedavg", "fedprox", "fedadam"] = "fedavg"
    proximal_mu: float = 0.01
    server_lr: float = 0.01
    personal_norms: bool = False

    def __post_init__(self) -> None:
        check_rules(FEDERATED_RULES, self, "federated.")

    @property
    def wanted(self) -> bool:
        """Whether the run is federated."""
        return self.clients is not None

    @property
    def per_round(self) -> int:
        """Clients that train in a round."""
        return max(1, round(self.participation * (self.clients or 0)))


def check_has_norms(config: FederatedConfig) -> None:
    """Raise `PwsError` for a run whose checkpoints lack the norms."""
    if config.personal_norms:
        raise PwsError(
            "a run with federated.personal_norms has a network per client: its checkpoints hold everything but the norms, "
            "which are with the clients. summary.json has the accuracy over all clients. For one network leave it out."
        )


def check_federated(recipe: Any) -> None:
    """Raise `PwsError` for a setting that a federated run can't have."""
    check_only(recipe, UNLIKE_CLIENTS, "a federated run (federated.clients)")
    if recipe.privacy.wanted:
        raise PwsError(
            "privacy.epsilon and noise are settings of `pws train`: clients of a federated run do not add noise. Leave out "
            "privacy, or federated."
        )
    if recipe.trainer.precision not in ("32-true", "64-true") or recipe.trainer.devices not in ("auto", 1):
        raise PwsError(
            "a federated run takes trainer.precision 32-true or 64-true and one device (trainer.devices 1); got precision "
            f"{recipe.trainer.precision} and devices {recipe.trainer.devices}."
        )
