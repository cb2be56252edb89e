"""The Flower app of the server, as a deployment starts it; the client's is `pws.federated.client.app`."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from pws._errors import PwsError, one_line
from pws.federated.deployment import FAILED, SAID
from pws.federated.server import serve

server = ServerApp()  # without a type: Flower looks for a plain assignment


@server.main()
def main(grid: Grid, context: Context) -> None:
    """The run of a folder; what it says goes to Flower's log, from where the process that deploys it reads."""
    try:
        serve(grid, Path(str(context.run_config["folder"])), lambda line: print(f"{SAID}{line}", flush=True))
    except PwsError as error:
        print(f"{FAILED}{one_line(error, 2000)}", flush=True)
