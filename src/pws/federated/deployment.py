"""Flower's deployment on one machine: its server (SuperLink), and a process per client (SuperNode) that talks to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from pws._errors import PwsError
from pws.federated.server import Say
from pws.training.run_folder import SUMMARY

FOLDER: Final = "deployment"
"""What Flower keeps, and the logs of all processes."""
HOST: Final = "127.0.0.1"
SAID: Final = "pws says: "
FAILED: Final = "pws failed: "
"""What the server's lines begin with among Flower's."""
STARTING: Final = 120.0
"""Seconds that Flower's server has to start."""
APP: Final = """
[project]
name = "federation"
version = "1.0.0"
description = "A federated run of pws"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "pws"
components = {{ serverapp = "pws.federated.apps:server", clientapp = "pws.federated.client:app" }}
config = {{ folder = {folder} }}
"""
CONNECTION: Final = """
[superlink]
default = "here"
here = {{ address = "{address}", insecure = true }}
"""


def deploy(clients: int, folder: Path, say: Say) -> None:
    """Start the server and the clients of the run in `folder`, pass on what the server says, and end them.

    Raises:
        PwsError: the server says so, or has ended without an end of the run.
    """
    home = folder.absolute() / FOLDER
    shutil.rmtree(home, ignore_errors=True)
    (home / "app").mkdir(parents=True)
    link, *ports = _free_ports(clients + 1)
    (home / "app" / "pyproject.toml").write_text(APP.format(folder=json.dumps(str(folder.absolute()))), "utf-8")
    (home / "config.toml").write_text(CONNECTION.format(address=f"{HOST}:{link}"), "utf-8")
    with ExitStack() as processes:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # to be ended is to be interrupted: the processes go too
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            processes.callback(signal.signal, signal.SIGTERM, before)

        def start(name: str, *command: str) -> subprocess.Popen[str]:
            return processes.enter_context(_running(home, name, command))

        settings = ("--host", HOST, "--insecure")
        server = start(
            "server", "flower-superlink", *settings, f"--port={link}", "--disable-runtime-dependency-installation"
        )
        _wait_for(server, link, home)
        for number, port in enumerate(ports):
            config = f"partition-id={number} num-partitions={clients}"
            address = ("--superlink", f"{HOST}:{link}", f"--port={port}", "--node-config", config)
            start(f"client-{number}", "flower-supernode", *settings, *address)
        _follow(start("run", "flwr", "run", str(home / "app"), "here", "--stream"), home, say)
    if not (folder / SUMMARY).is_file():
        raise PwsError(f"Flower ended without an end of the run: {_last_words(home / 'run.log')}")


def _follow(run: subprocess.Popen[str], home: Path, say: Say) -> None:
    """Pass on what the server says until it ends."""
    assert run.stdout is not None
    failure = None
    with (home / "run.log").open("w", encoding="utf-8") as log:
        for line in run.stdout:
            log.write(line)
            log.flush()
            if line.startswith(SAID):
                say(line.removeprefix(SAID).rstrip("\n"))
            elif line.startswith(FAILED):
                failure = line.removeprefix(FAILED).strip()
    if failure is not None:
        raise PwsError(failure)


def _wait_for(server: subprocess.Popen[str], port: int, home: Path) -> None:
    ends = time.monotonic() + STARTING
    while time.monotonic() < ends and server.poll() is None:
        with socket.socket() as found:
            if found.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.2)
    raise PwsError(f"Flower's server did not start within {STARTING:.0f} s: {_last_words(home / 'server.log')}")


def _last_words(log: Path) -> str:
    """The end of a log: a new run's folder goes with its error, and the logs with it."""
    return " ".join(log.read_text("utf-8").split())[-500:]


@contextmanager
def _running(home: Path, name: str, command: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
    """A process of Flower's that ends with the block; it asks nothing of the internet."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": path}
    program = shutil.which(command[0], path=path)
    if program is None:
        raise PwsError(f"Flower's program {command[0]} is missing: pip install 'pws-torch[federated]'.")
    with (home / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if name == "run" else log,
            stderr=log if name != "run" else subprocess.STDOUT,
            text=True,
            env=os.environ | own,
            start_new_session=True,  # Ctrl-C is for this process, which ends them
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in bound:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in bound]
