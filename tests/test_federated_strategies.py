"""The settings of a federated run, and what FedProx and FedAdam compute."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from small_runs import ONE_THREAD, TINY
from torch import nn
from torch.nn import functional as F

import pws
from pws import PwsError
from pws.cli import main
from pws.federated.local import start_round, train_steps
from pws.federated.nodes import Nodes
from pws.federated.personal import keep, kept
from pws.federated.replies import fault_of
from pws.federated.server import _as
from pws.federated.simulation import Simulation
from pws.federated.strategies import moments_of, restore_moments, strategy_of
from pws.training import OptimConfig, Recipe, load_recipe
from pws.training.classifier import Classifier
from pws.training.federated import FederatedConfig
from pws.training.schedule import lr_factor


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("clients", 0, "at least 1"),
        ("rounds", 0, "at least 1"),
        ("local_epochs", 0, "at least 1"),
        ("local_steps", -1, "at least 1"),
        ("participation", 0.0, "above 0, and at most 1"),
        ("participation", 1.5, "above 0, and at most 1"),
        ("alpha", 0.0, "positive"),
        ("alpha", float("inf"), "positive"),
        ("proximal_mu", -1.0, "positive"),
        ("server_lr", 0.0, "positive"),
    ],
)
def test_numbers_keep_their_rules(setting: str, value: Any, rule: str) -> None:
    with pytest.raises(PwsError, match=rf"federated\.{setting} must be {rule}"):
        FederatedConfig(**{setting: value})


@pytest.mark.parametrize(
    "flag",
    [
        *(
            "--optim.ema=0.9",
            "--model.calibrate=all",
            "--trainer.accumulate=2",
            "--trainer.early_stop=3",
            "--trainer.max_steps=9",
        ),
        *(
            "--trainer.compile=true",
            "--trainer.logger=wandb",
            "--trainer.strategy=ddp",
            "--trainer.precision=bf16-mixed",
        ),
    ],
)
def test_settings_that_clients_can_not_have_are_refused(flag: str) -> None:
    load_recipe("fashion-mnist-allconv-pws", flag)
    with pytest.raises(PwsError, match=r"a federated run (\(federated.clients\) )?takes " + flag[2:].split("=")[0]):
        load_recipe("fashion-mnist-allconv-pws", flag, "--federated.clients=2")


def test_the_schedule_counts_rounds() -> None:
    config = FederatedConfig(clients=2, rounds=4)
    recipe = Recipe(optim=OptimConfig(lr=0.8, schedule="step", milestones=[2]), federated=config)
    rates = []
    for factor in (lr_factor(recipe.optim, config.rounds, 1)(number) for number in range(4)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
        start_round(optimizer, factor)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.8, 0.8, 0.08, 0.08])


@pytest.mark.parametrize("form", ["pws.optim", "clip_grad"])
def test_the_bound_shrinks_with_the_rate_of_the_round(form: str) -> None:
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    before = layer.weight.detach().clone()
    optimizer: torch.optim.Optimizer = (
        pws.optim.SGD(layer, lr=0.8) if form == "pws.optim" else torch.optim.SGD(layer.parameters(), lr=0.8)
    )
    start_round(optimizer, 0.1)
    layer.weight.grad = torch.full_like(layer.weight, 100.0)
    if form == "clip_grad":
        pws.clip_grad(layer, optimizer)
    optimizer.step()
    assert float((layer.weight - before).detach().norm()) == pytest.approx(0.03, rel=1e-9)


@pytest.mark.parametrize(
    ("trained", "metrics", "fault"),
    [
        (True, {"num-examples": 0, "loss": 1.0}, "sent 0 as its number of images"),
        (True, {"num-examples": -5, "loss": 1.0}, "sent -5 as its number of images"),
        (True, {"num-examples": math.nan, "loss": 1.0}, "sent nan as its number of images"),
        (True, {"num-examples": math.inf, "loss": 1.0}, "sent inf as its number of images"),
        (True, {"num-examples": 5, "loss": math.nan}, "sent NaN as its loss"),
        (True, {"num-examples": 5, "loss": math.inf}, None),
        (False, {"num-examples": 0, "loss": 0.0, "accuracy": 0.0}, None),
        (False, {"num-examples": math.nan, "loss": 0.0, "accuracy": 0.0}, "sent nan as its number of images"),
    ],
)
def test_numbers_that_no_average_can_weigh_by_are_a_fault(
    trained: bool, metrics: dict[str, float], fault: str | None
) -> None:
    weight = torch.zeros(2)
    content = RecordDict({"metrics": MetricRecord(dict(metrics))})
    if trained:
        content["arrays"] = ArrayRecord({"weight": weight})
    found = fault_of(answer(content), frozenset(metrics), {"weight": weight} if trained else None)
    assert found == fault


def answer(content: RecordDict) -> Message:
    strategy = strategy_of(FederatedConfig(clients=1), [])
    (sent,) = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), Nodes(Simulation(None, 1), {0: 0})._shown([0]))  # type: ignore[arg-type]
    return Message(content, reply_to=sent)


def test_an_average_of_counts_is_rounded() -> None:
    assert _as(torch.tensor(49.9999), torch.int64).item() == 50
    assert _as(torch.tensor([0.25, 0.5]), torch.float32).tolist() == [0.25, 0.5]


def test_norms_of_two_rounds_ago_are_kept(tmp_path: Path) -> None:
    for number in (1, 2, 4, 5):
        keep(tmp_path, 3, number, {"weight": torch.tensor(float(number))})
    assert [kept(tmp_path, 3, number).get("weight") for number in (5, 4, 3, 2)] == [5.0, 4.0, 2.0, 2.0]


@pytest.mark.parametrize(("part", "clients", "wanted"), [(0.5, 10, 5), (0.01, 10, 1), (1.0, 3, 3)])
def test_a_part_of_the_clients_takes_part(part: float, clients: int, wanted: int) -> None:
    assert FederatedConfig(clients=clients, participation=part).per_round == wanted


def test_fedprox_adds_half_the_squared_distance() -> None:
    """Against autograd, in float64, over three steps."""
    torch.manual_seed(0)
    batches = [(torch.randn(8, 1, 2, 2).double(), torch.randint(3, (8,))) for _ in range(3)]
    ours, theirs = (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    start = [p.detach().clone() for p in theirs.parameters()]
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for images, labels in batches:
        optimizer.zero_grad()
        distance = sum((p - s).square().sum() for p, s in zip(theirs.parameters(), start, strict=True))
        (F.cross_entropy(theirs(images), labels) + 0.7 / 2 * distance).backward()
        optimizer.step()
    train_steps(
        Classifier(ours, OptimConfig(), 3), torch.optim.SGD(ours.parameters(), lr=0.5), batches, proximal_mu=0.7
    )
    torch.testing.assert_close(ours[1].weight, theirs[1].weight, rtol=1e-12, atol=1e-12)


def reply(state: dict[str, np.ndarray[Any, Any]], images: int, to: Message) -> Message:
    arrays = ArrayRecord({name: torch.from_numpy(value) for name, value in state.items()})
    metrics = MetricRecord({"num-examples": images, "loss": 1.0})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=to)


def test_fedadam_steps_parameters_and_averages_buffers() -> None:
    """Reddi et al.'s formulas by hand over two rounds; the second after a restored checkpoint."""
    grid = Simulation(None, 2)  # type: ignore[arg-type]
    nodes = Nodes(grid, {0: 0, 1: 1})
    config = FederatedConfig(clients=2, strategy="fedadam", server_lr=0.1)
    strategy = strategy_of(config, ["running"])
    x, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for number in (1, 2):
        sent = ArrayRecord({"weight": torch.from_numpy(x), "running": torch.tensor([5.0])})
        messages = list(strategy.configure_train(number, sent, ConfigRecord(), nodes._shown([0, 1])))
        states = [{"weight": x + number, "running": np.array([4.0])}, {"weight": x - 1, "running": np.array([1.0])}]
        replies = [
            reply(state, images, message) for state, images, message in zip(states, (3, 1), messages, strict=True)
        ]
        arrays, _ = strategy.aggregate_train(number, replies)
        assert arrays is not None
        delta = 0.75 * number - 0.25
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        eta = 0.1 * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        x = x + eta * m / (np.sqrt(v) + 1e-3)
        np.testing.assert_allclose(arrays["weight"].numpy(), x, rtol=1e-12)
        np.testing.assert_allclose(arrays["running"].numpy(), 0.75 * 4 + 0.25 * 1)
        moments = moments_of(strategy)
        strategy = strategy_of(config, ["running"])
        restore_moments(strategy, moments)


def test_fedprox_tells_its_clients_mu() -> None:
    strategy = strategy_of(FederatedConfig(clients=2, strategy="fedprox", proximal_mu=0.3), [])
    nodes = Nodes(Simulation(None, 2), {0: 0, 1: 1})  # type: ignore[arg-type]
    (message,) = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), nodes._shown([1]))
    assert message.content.config_records["config"]["proximal-mu"] == 0.3
    assert message.metadata.dst_node_id == 1


def test_without_flower_the_error_names_the_extra() -> None:
    code = "import sys; sys.modules['flwr'] = None; from pws.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "federate", "fashion-mnist-allconv-pws", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr == "pws: pws.federated needs Flower: pip install 'pws-torch[federated]'.\n"


def test_the_help_has_the_settings_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["federate", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--federated.participation" in printed
    assert "Dirichlet(alpha)" in printed
    assert "Example: pws federate" in printed
