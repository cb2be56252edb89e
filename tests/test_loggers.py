"""`trainer.logger`: what Weights & Biases and MLflow were given, read back from their own files."""

from __future__ import annotations

import csv
import json
import os
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pws.training.run as run_module
from pws._errors import PwsError
from pws.training import Recipe, load_recipe, train

Points = Counter[tuple[str, int, float]]
"""Name, step and value, counted."""


def recipe(logger: str, *flags: str) -> Recipe:
    return load_recipe(
        "fashion-mnist-allconv-pws",
        *("--data.name=digits", "--data.image_size=12", "--data.train_images=128", "--data.batch_size=8"),
        *("--model.width=0.08", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.epochs=2"),
        *("--name=logged", "--optim.lr=0.07", f"--trainer.logger={logger}"),
        *flags,
    )


def in_metrics_file(run: Path) -> Points:
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    keys = [key for key in rows[0] if key not in ("step", "epoch")]
    return Counter((key, int(row["step"]), round(float(row[key]), 9)) for row in rows for key in keys if row[key])


def wandb_records(run: Path) -> Iterator[Any]:
    """All records of the offline runs, in order."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for content in leveldb_log(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            yield record


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, whose header is 7 bytes here: blocks of 32 KiB, records in pieces."""
    assert data[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for the head of a piece
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wait_for_wandb(run: Path, sessions: int) -> None:
    """Its own process writes the files, the end of each session last."""
    end = time.monotonic() + 60
    while sum(record.WhichOneof("record_type") == "exit" for record in wandb_records(run)) < sessions:
        assert time.monotonic() < end
        time.sleep(0.1)


def in_wandb(run: Path) -> tuple[Points, set[tuple[str, str, str]], dict[str, str]]:
    points, runs, config = Points(), set(), dict[str, str]()
    for record in wandb_records(run):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {item.key or item.nested_key[0]: float(item.value_json) for item in record.history.item}
            step = int(row["trainer/global_step"])
            points.update(
                (key, step, round(row[key], 9))
                for key in row
                if key[0] != "_" and key[:7] != "trainer" and key != "epoch"
            )
        if kind == "run":
            runs.add((record.run.project, record.run.display_name, record.run.run_id))
        for part in [record.run.config, record.config] if kind in ("run", "config") else []:
            config |= {item.key: item.value_json for item in part.update}
    return points, runs, config


def killed(monkeypatch: pytest.MonkeyPatch, logged: Recipe, run: Path) -> None:
    """The run, ended in its second epoch."""
    original = run_module.TaskModule.on_train_batch_start

    def stop(self: Any, batch: Any, index: int) -> None:
        if self.trainer.current_epoch == 1:
            raise RuntimeError("killed")
        original(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(run_module.TaskModule, "on_train_batch_start", stop)
        with pytest.raises(RuntimeError, match="killed"):
            train(logged, run, quiet=True)


def test_wandb_has_the_numbers_and_the_recipe_and_a_resumed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    killed(monkeypatch, recipe("wandb"), run)
    train(recipe("wandb"), run, resume=True, quiet=True)
    wait_for_wandb(run, 2)
    points, runs, config = in_wandb(run)
    assert len(points) > 6
    assert points == in_metrics_file(run)
    assert runs == {("pws", "logged", (run / "wandb" / "run_id").read_text().strip())}
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    assert json.loads(config["optim"])["lr"] == 0.07
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("store", ["in the run's folder", "by the environment"])
def test_mlflow_has_the_numbers_and_the_recipe_and_a_resumed_run_goes_on(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    uri = f"sqlite:///{run}/mlflow/mlflow.db"
    if store == "by the environment":
        uri = f"file:{tmp_path}/theirs"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    killed(monkeypatch, recipe("mlflow"), run)
    train(recipe("mlflow"), run, resume=True, quiet=True)
    assert ("MLFLOW_TRACKING_URI" in os.environ) == (store == "by the environment")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("pws")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (run / "mlflow" / "run_id").read_text().strip()
    assert (found.info.run_name, found.info.status) == ("logged", "FINISHED")
    assert found.data.params["optim/lr"] == "0.07"
    names = [name for name in found.data.metrics if name != "epoch"]
    points = Points(
        (name, one.step, round(one.value, 9))
        for name in names
        for one in client.get_metric_history(found.info.run_id, name)
    )
    assert len(points) > 6
    assert points == in_metrics_file(run)


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_a_run_whose_loss_went_non_finite_has_failed_there(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    diverging = ("--model.method=none", "--optim.lr=1e6", "--optim.step_bound=null")
    with pytest.raises(run_module.NonFiniteLossError):
        train(recipe(logger, *diverging), run, quiet=True)
    known = (run / logger / "run_id").read_text().strip()
    if logger == "mlflow":
        assert MlflowClient(f"sqlite:///{run}/mlflow/mlflow.db").get_run(known).info.status == "FAILED"
    else:
        wait_for_wandb(run, 1)
        ends = [record.exit.exit_code for record in wandb_records(run) if record.WhichOneof("record_type") == "exit"]
        assert ends == [1]


@pytest.mark.parametrize(("logger", "package"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_package_that_is_missing_is_named(
    logger: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PwsError, match=rf"needs {package}: pip install 'pws-torch\[{logger}\]'"):
        train(recipe(logger), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_service_that_can_not_be_had_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "carrier-pigeon://loft")
    with pytest.raises(PwsError, match=r"trainer.logger mlflow can't start: .*MLFLOW_TRACKING_URI"):
        train(recipe("mlflow"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
