"""What a step takes on several processes: memory of each with FSDP2, and bytes exchanged by PWS and by SyncBatchNorm."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

import pws
from benchmarks.experiment import PROGRAM, Say, run_experiment
from pws.bench.plotting import new_figure, save_figure
from pws.bench.result_file import Result, rounded, write_result
from pws.methods import build_method
from pws.models import build_model
from pws.optim.sharding import local
from pws.training.shard import shard

PROCESSES: Final = (1, 2, 4)
PARTS: Final = ("weights", "gradients", "latents and momentum")
EXCHANGED: Final = ("collectives", "bytes")
MIB: Final = 2**20
FLOAT: Final = 4


def run(arguments: list[str]) -> int:
    """Measure the memory of each process, and count what is exchanged."""
    line = "Memory per process of ResNet-50 with FSDP2, and bytes exchanged per step by PWS and by SyncBatchNorm."
    return run_experiment("scale", line, measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Write scale.json and scale.png."""
    name, processes = ("cifar-resnet18", PROCESSES[:2]) if quick else ("resnet50", PROCESSES)
    counted = {str(count): found_on(name, count) for count in processes}
    memory = {count: {part: one[part] for part in PARTS} for count, one in counted.items()}
    for count, parts in memory.items():
        say(f"{name} on {count} processes: " + ", ".join(f"{part} {mib:.0f} MiB" for part, mib in parts.items()))
    exchanged = exchanged_by(name)
    exchanged["PWS, FSDP2"] = {key: counted[str(processes[-1])][key] for key in EXCHANGED}
    for row, found in exchanged.items():
        say(f"{row}: {found['collectives']:,.0f} collectives, {found['bytes']:,.0f} bytes per step and process")
    write_result(out / "scale.json", f"{PROGRAM} scale", {"model": name, "memory_mib": memory, "exchanged": exchanged})
    _draw(name, memory, out / "scale.png")


def found_on(name: str, processes: int) -> dict[str, float]:
    """MiB that the fullest process holds after a step of `pws.optim.SGD` with momentum, and what the step itself exchanges."""
    if processes == 1:
        return _held(name, None)
    with TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        spawn(_process, (name, processes, port, folder), nprocs=processes)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)]
    return {part: max(one[part] for one in found) for part in (*PARTS, *EXCHANGED)}


def _process(rank: int, name: str, processes: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    torch.save(_held(name, init_device_mesh("cpu", (processes,))), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def _held(name: str, mesh: Any) -> dict[str, float]:
    torch.manual_seed(0)
    model = build_model(name, build_method("pws"))
    if mesh is not None:
        shard(model, mesh)
    optimizer = pws.optim.SGD(model, lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    with patch.object(distributed, "all_reduce", wraps=distributed.all_reduce) as reduced:
        optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    parameters = list(model.parameters())
    gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
    sent = [call.args[0] for call in reduced.call_args_list]
    exchanged = (float(len(sent)), float(sum(tensor.nbytes for tensor in sent)))
    return dict(zip((*PARTS, *EXCHANGED), (*map(_mib, (parameters, gradients, states)), *exchanged), strict=True))


def _mib(tensors: Iterable[Tensor]) -> float:
    return rounded(sum(local(t).numel() * t.element_size() for t in tensors) / MIB, 4)


def exchanged_by(name: str) -> dict[str, dict[str, float]]:
    """Collectives and bytes per step and process, in float32.

    SyncBatchNorm gathers mean, inverse deviation and count of each layer in the forward pass (2 C + 1 numbers), and reduces two
    sums in the backward pass (2 C). With DDP each process has all that the bound of PWS needs.
    """
    network = build_model(name, build_method("bn"))
    widths = [m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    weights = sum(p.numel() for p in network.parameters())
    return {
        "gradients": {"collectives": 1.0, "bytes": float(FLOAT * weights)},
        "SyncBatchNorm": {
            "collectives": float(2 * len(widths)),
            "bytes": float(FLOAT * sum(4 * c + 1 for c in widths)),
        },
        "PWS, DDP": {"collectives": 0.0, "bytes": 0.0},
    }


def memory_table(result: Result) -> str:
    """MiB per process."""
    memory: dict[str, dict[str, float]] = result["memory_mib"]
    lines = [f"| processes | {' | '.join(PARTS)} | together |", "| --- |" + " --- |" * (len(PARTS) + 1)]
    for count, parts in memory.items():
        sizes = [parts[part] for part in PARTS]
        lines.append(f"| {count} | {' | '.join(f'{size:.0f}' for size in (*sizes, sum(sizes)))} |")
    return "\n".join(lines)


def exchanged_table(result: Result) -> str:
    """Collectives and bytes per step."""
    found: dict[str, dict[str, float]] = result["exchanged"]
    lines = ["| | collectives per step | bytes per step and process |", "| --- | --- | --- |"]
    return "\n".join(
        [*lines, *(f"| {row} | {n['collectives']:,.0f} | {n['bytes']:,.0f} |" for row, n in found.items())]
    )


def _draw(name: str, memory: dict[str, dict[str, float]], path: Path) -> None:
    figure = new_figure(6, 3.5)
    axes = figure.subplots()
    bottom = [0.0] * len(memory)
    for part in PARTS:
        sizes = [parts[part] for parts in memory.values()]
        axes.bar(list(memory), sizes, bottom=bottom, label=part, width=0.6)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    axes.set_xlabel("processes")
    axes.set_ylabel(f"MiB per process, {name}")
    axes.legend()
    save_figure(figure, path)
