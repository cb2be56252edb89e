"""`pws federate`: the average, the resumed run, clients that fail, and what stays with a client."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from small_runs import TINY, assert_equal, weights
from torch import Tensor
from torch.nn import functional as F

import pws
import pws.training
from pws import PwsError
from pws._mark import marked
from pws.cli import main
from pws.federated import client as client_app
from pws.federated import federate
from pws.federated.federation import Federation, federation_in
from pws.federated.personal import kept
from pws.training import Recipe, evaluate, load_recipe
from pws.training.metrics_file import rows_before

Row = dict[str, float]
FLAGS = (
    *TINY,
    *("--data.batch_size=16", "--optim.weight_decay=0.001", "--federated.clients=3", "--federated.rounds=3"),
    "--federated.alpha=0.5",
)


def recipe_of(*flags: str) -> Recipe:
    return load_recipe("fashion-mnist-allconv-pws", *FLAGS, *flags)


def run(recipe: Recipe, folder: Path, **settings: Any) -> Any:
    return federate(recipe, folder, quiet=True, **settings)


def rows(folder: Path) -> list[Row]:
    found, damaged = rows_before(folder / "metrics.csv", 10**6)
    assert not damaged
    return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in found]


@pytest.mark.parametrize("clients", [1, 3])
def test_rounds_are_averages_of_clients_that_adopt_the_average(clients: int, tmp_path: Path) -> None:
    """In float64, against a loop that knows nothing of Flower: each round a new pws.optim.SGD on the averaged kernels."""
    recipe = recipe_of("--trainer.precision=64-true", "--optim.schedule=linear", f"--federated.clients={clients}")
    run(recipe, tmp_path / "run")
    federation = federation_in(tmp_path / "run")
    model = federation.module.model
    model.load_state_dict(federation.initial)
    average = {name: value.clone() for name, value in federation.initial.items()}
    images = sum(len(share) for share in federation.shares)
    for number in range(3):
        total = {name: torch.zeros_like(value) for name, value in average.items()}
        for client in range(clients):
            own = copy.deepcopy(model)
            own.load_state_dict(average)
            groups = pws.param_groups(own, lr=recipe.optim.lr * (1 - number / 3), weight_decay=0.001)
            data = federation.client_data(client)
            data.first_epoch = (number + 1) * 100_000
            batches = list(data.train_dataloader())
            # Steps at the bound, with momentum that starts anew, go 0.3 each on average.
            reach = sum((1 - 0.9**j) / (1 - 0.9) for j in range(1, len(batches) + 1)) / len(batches)
            optimizer = pws.optim.SGD(groups, momentum=0.9, step_bound=0.3 / reach)
            for group in optimizer.param_groups:  # the bound is on the step at the schedule's largest rate
                group["initial_lr"] = recipe.optim.lr
            for inputs, labels in batches:
                optimizer.zero_grad()
                F.cross_entropy(own(inputs.double()), labels).backward()
                optimizer.step()
            share = len(federation.shares[client]) / images
            total = {name: total[name] + share * value for name, value in own.state_dict().items()}
        average = total
    found = weights(tmp_path / "run")
    assert_equal({name.removeprefix("model."): value for name, value in found.items()}, average, 1e-10)
    for name in marked(model):  # the average of centred filters is centred, so that adoption changes nothing
        kernel = average[f"{name}.weight"].flatten(1)
        assert float(kernel.mean(1).abs().max()) < 1e-12


@pytest.mark.parametrize(
    "flags",
    [
        ("--federated.strategy=fedadam", "--federated.participation=0.67", "--federated.local_steps=3"),
        ("--model.method=bn", "--federated.personal_norms=true", "--federated.skew=rotate"),
    ],
    ids=["fedadam, some of the clients", "fedbn"],
)
def test_a_resumed_run_ends_with_the_same_numbers(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(*flags)
    whole = run(recipe, tmp_path / "whole")
    train, asked = client_app.train_client, []

    def interrupted(federation: Federation, client: int, number: int, mu: float) -> float:
        asked.append(number)
        if asked.count(2) == 2:  # the first client of the round is through
            raise KeyboardInterrupt
        return train(federation, client, number, mu)

    monkeypatch.setattr(client_app, "train_client", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut")
    monkeypatch.undo()
    assert len(rows(tmp_path / "cut")) == 1
    resumed = run(recipe, tmp_path / "cut", resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert_equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"), 0.0)
    assert replace(resumed, seconds=0) == replace(whole, seconds=0)


def dropping_out(*_: Any) -> float:
    raise ZeroDivisionError("the battery is empty")


def sending_nan(federation: Federation, *_: Any) -> float:
    with torch.no_grad():
        next(federation.module.model.parameters()).fill_(float("nan"))
    return 1.0


FAULTS: dict[str, tuple[Callable[..., float], str]] = {
    "drops out": (dropping_out, r"dropped out \(ZeroDivisionError: the battery is empty\)"),
    "sends NaN": (sending_nan, r"sent NaN or infinity in 1 of \d+ arrays \(first: \S+weight\)"),
    "has another architecture": (
        lambda *_: 1.0,
        r"sent weights of another architecture \(2 differences, such as: \S+weight is missing\)",
    ),
}


@pytest.fixture
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Tensor]]:
    """The fault of that name at the clients from 1 on; by round what client 0 has sent."""
    fault, first = request.param
    train, sent = client_app.train_client, {}
    bad = [False]

    def trained(federation: Federation, client: int, number: int, mu: float) -> float:
        bad[0] = client >= first
        if bad[0]:
            return FAULTS[fault][0](federation, client, number, mu)
        loss = train(federation, client, number, mu)
        sent[number] = copy.deepcopy(federation.module.state_dict())
        return loss

    def arrays(state: dict[str, Tensor]) -> ArrayRecord:
        if bad[0] and fault == "has another architecture":
            name = next(iter(state))
            state = {("other.weight" if key == name else key): value for key, value in state.items()}
        return ArrayRecord(state)

    monkeypatch.setattr(client_app, "train_client", trained)
    monkeypatch.setattr(client_app, "ArrayRecord", arrays)
    return sent


@pytest.mark.parametrize("failing", [(fault, 1) for fault in FAULTS], indirect=True, ids=list(FAULTS))
def test_a_client_that_fails_is_named_and_left_out(
    failing: dict[int, dict[str, Tensor]],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = FAULTS[request.node.callspec.params["failing"][0]][1]
    summary = federate(recipe_of("--federated.rounds=2"), tmp_path / "run")
    printed = capsys.readouterr().out
    for number in (1, 2):
        for client in (1, 2):
            line = rf"^round {number}: client {client} is left out: it {said}$"
            assert len([1 for given in printed.splitlines() if re.match(line, given)]) == 1, printed
    assert summary.left_out == {"1": 2, "2": 2}
    assert [row["clients"] for row in rows(tmp_path / "run")] == [1, 1]
    assert_equal(weights(tmp_path / "run"), failing[2], 0.0)  # the average of one


@pytest.mark.parametrize("failing", [(fault, 0) for fault in FAULTS], indirect=True, ids=list(FAULTS))
def test_a_round_without_a_client_is_one_error(
    failing: dict[int, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["federate", "fashion-mnist-allconv-pws", *FLAGS, f"--runs={tmp_path}", "--name=run"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "round 1 ended without anything to average: all 3 clients are left out; client 0 " in error
    assert not (tmp_path / "run").exists()


def test_personal_norms_stay_with_their_client(tmp_path: Path) -> None:
    """FedBN: no message carries a norm, and each client goes on with its own."""
    recipe = recipe_of("--model.method=bn", "--federated.personal_norms=true", "--federated.skew=dark")
    summary = run(recipe, tmp_path / "run")
    federation = federation_in(tmp_path / "run")
    names = {name for name in federation.initial if ".norm" in name or "running" in name}
    assert federation.personal >= names
    assert any(name.endswith("running_var") for name in federation.personal)
    own = [kept(tmp_path / "run", client, 3) for client in range(3)]
    for name in federation.personal:
        if name.endswith(("running_mean", "weight")):
            assert not torch.equal(own[0][name], own[1][name])
        stored = weights(tmp_path / "run")[f"model.{name}"]
        assert torch.equal(stored, federation.initial[name])  # the server has never seen another
    assert 0 < summary.metrics["accuracy"] <= 1
    for use in (evaluate, pws.load, pws.training.weights):
        with pytest.raises(PwsError, match="norms, which are with the clients"):
            use(tmp_path / "run")


def test_methods_without_norms_can_keep_none(tmp_path: Path) -> None:
    with pytest.raises(PwsError, match=r"federated.personal_norms .* the method pws has none"):
        run(recipe_of("--federated.personal_norms=true"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_running_statistics_are_averaged(tmp_path: Path) -> None:
    recipe = recipe_of("--model.method=bn", "--federated.rounds=1", "--federated.strategy=fedadam")
    run(recipe, tmp_path / "run")
    federation, total = federation_in(tmp_path / "run"), 0.0
    (name,) = [name for name in federation.initial if name.endswith("running_var")][:1]
    images = sum(map(len, federation.shares))
    from pws.federated.local import train_client

    for client in range(3):
        federation.load()
        train_client(federation, client, 1, 0.0)
        total = total + len(federation.shares[client]) / images * federation.module.model.state_dict()[name]
    torch.testing.assert_close(weights(tmp_path / "run")[f"model.{name}"], total)


def test_the_run_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder is one for the other commands."""
    code = main(["federate", "fashion-mnist-allconv-pws", *FLAGS, f"--runs={tmp_path}", "--name=run"])
    printed = capsys.readouterr().out
    assert code == 0
    assert printed.count("round ") == 3 + 1
    assert "3 of 3 clients" in printed
    assert " left\n" in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best"] == max(row["val_accuracy"] for row in rows(tmp_path / "run"))
    assert summary["best"] == rows(tmp_path / "run")[summary["best_round"] - 1]["val_accuracy"]
    assert evaluate(tmp_path / "run").accuracy == pytest.approx(summary["metrics"]["accuracy"])
    assert load_recipe(tmp_path / "run" / "recipe.yaml").federated.clients == 3
    assert (tmp_path / "run" / "rounds.png").stat().st_size > 5000
    for flags, said in (
        ([], "exists"),
        (["--resume"], "is finished"),
        (["--resume", "--federated.alpha=1"], "finished"),
    ):
        assert main(["federate", "fashion-mnist-allconv-pws", *FLAGS, f"--runs={tmp_path}", "--name=run", *flags]) == 2
        assert said in capsys.readouterr().err
    assert main(["train", str(tmp_path / "run"), f"--runs={tmp_path}", "--name=other"]) == 2
    assert "`pws federate` trains" in capsys.readouterr().err


@pytest.mark.slow  # a minute: Flower starts a process for each message to a client
def test_a_deployment_has_the_numbers_of_the_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # In float64: another number of threads, or a kernel chosen otherwise, rounds otherwise.
    recipe = recipe_of("--federated.clients=2", "--federated.rounds=2", "--trainer.precision=64-true")
    deployed = federate(recipe, tmp_path / "deployed", engine="deployment")
    said = capsys.readouterr().out
    assert "round 2/2" in said
    simulated = run(recipe, tmp_path / "simulated")
    assert_equal(weights(tmp_path / "deployed"), weights(tmp_path / "simulated"), 1e-9)
    for found, wanted in zip(rows(tmp_path / "deployed"), rows(tmp_path / "simulated"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)
    assert deployed.metrics == pytest.approx(simulated.metrics, rel=1e-6)
    # Seconds and threads are those of the machine.
    alike = {"seconds": 0, "metrics": {}, "device": ""}
    assert replace(deployed, **alike) == replace(simulated, **alike)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was ended behind its last round, before the test."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(recipe_of("--model.method=bn"), folder)
    (folder / "summary.json").unlink()
    return folder


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def changed_within(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["federated"]["progress"]["best"] = 1.0
    torch.save(content, path)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("fault", [cut_short, changed_within])
def test_a_damaged_checkpoint_is_done_without(
    fault: Callable[[Path], None], stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    wanted = weights(folder)
    fault(folder / "checkpoints" / "last.ckpt")
    summary = run(recipe_of("--model.method=bn"), folder, resume=True)
    assert re.search(r"^pws: \S+last.ckpt .*\. Going on from \S+before.ckpt\.$", capsys.readouterr().err, re.MULTILINE)
    assert summary.rounds == 3
    assert rows(folder) == rows(stopped)
    assert_equal(weights(folder), wanted, 0.0)


def all_damaged(folder: Path) -> None:
    for name in ("last.ckpt", "before.ckpt"):
        cut_short(folder / "checkpoints" / name)


def gone(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def of_another_program(folder: Path) -> None:
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del content["federated"], content["checksum"]
    torch.save(content, path)


def without_columns(folder: Path) -> None:
    (folder / "metrics.csv").write_text("nothing\n")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (all_damaged, "is not a checkpoint of pws train, or is cut off"),
        (gone, "does not exist"),
        (of_another_program, "is not a checkpoint of pws federate"),
        (without_columns, "must start with a line of columns"),
    ],
)
def test_a_run_that_can_not_go_on_is_left_as_it_is(
    fault: Callable[[Path], None], said: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    fault(folder)
    before = files_in(folder)
    assert main(["federate", str(folder), "--resume"]) == 2
    assert said in capsys.readouterr().err
    assert files_in(folder) == before


def test_another_recipe_can_not_go_on(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["federate", str(stopped), "--resume", "--federated.alpha=1"]) == 2
    assert "federated.alpha is 0.5 there, 1.0 here" in capsys.readouterr().err


def test_a_loss_beyond_all_numbers_is_left_out_of_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(federation: Federation, *_: Any) -> float:
        with torch.no_grad():
            for parameter in federation.module.model.parameters():
                parameter.fill_(1e30)  # finite, but no output is
        return 1.0

    monkeypatch.setattr(client_app, "train_client", huge)
    summary = run(recipe_of("--model.method=none", "--federated.rounds=1"), tmp_path / "run")
    assert list(json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]) == ["accuracy"]
    assert list(summary.metrics) == ["accuracy"]
