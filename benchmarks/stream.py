"""A streamed epoch of 100,000 small images: how fast, with how much memory, in which order."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, replace
from multiprocessing import active_children
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from torch.utils.data import DataLoader

from benchmarks.experiment import PROGRAM, Say, run_experiment
from pws.bench.plotting import new_figure, save_figure
from pws.bench.result_file import Result, rounded, write_result
from pws.training.data import ImageData
from pws.training.pack import pack
from pws.training.pack_sources import source_of
from pws.training.recipe import DataConfig

IMAGES: Final = 100_000
QUICK_IMAGES: Final = 3_000
WORKERS: Final = (0, 1, 2)
SAMPLES: Final = 20
MIB: Final = 2**20


@dataclass(frozen=True)
class Epoch:
    """What an epoch showed."""

    images_per_second: float
    memory_mib: list[float]
    """Resident, of this process and its loader processes together, from the first batch to the last."""


def run(arguments: list[str]) -> int:
    """Measure a streamed epoch."""
    line = "Pack 100,000 images of Fashion-MNIST and stream them: images per second, memory, order."
    return run_experiment("stream", line, measure, arguments)


def measure(out: Path, quick: bool, say: Say) -> None:
    """Pack, stream; write stream.json and stream.png."""
    count, name = (QUICK_IMAGES, "digits") if quick else (IMAGES, "fashion-mnist")
    with TemporaryDirectory() as temporary:
        packed = Path(temporary) / "packed"
        started = time.perf_counter()
        shards = pack_repeated(name, count, packed)
        seconds = time.perf_counter() - started
        say(f"{count:,} images packed into {shards} shards in {seconds:.0f} s on one process")
        orders = {f"seed {seed}, epoch {epoch}": order_of(packed, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
        if orders["seed 0, epoch 0"] != order_of(packed, 0, 0) or len(set(orders.values())) != len(orders):
            raise AssertionError(f"an order is that of its seed and epoch alone: {orders}")
        epochs = {}
        for workers in WORKERS[:1] if quick else WORKERS:
            epochs[workers] = epoch = stream(packed, workers)
            memory = epoch.memory_mib
            say(
                f"{workers} workers: {epoch.images_per_second:,.0f} images/s; memory {memory[0]:.0f} MiB at the start, "
                f"{memory[len(memory) // 2]:.0f} in the middle, {memory[-1]:.0f} at the end"
            )
    rows = {f"{workers} workers": vars(epoch) for workers, epoch in epochs.items()}
    result = {"images": count, "dataset": name, "shards": shards, "pack_seconds": rounded(seconds, 3), "orders": orders}
    write_result(out / "stream.json", f"{PROGRAM} stream", {**result, "epochs": rows})
    _draw(epochs, out / "stream.png")


def pack_repeated(name: str, count: int, out: Path) -> int:
    """Pack so many training images, the dataset's own again and again; returns the number of their shards."""
    source = source_of(name, "data", None, download=False)
    train = list(source.parts["train"])
    train = (train * (count // len(train) + 1))[:count]
    index = pack(replace(source, parts={**source.parts, "train": train}), out, 1, lambda *_: None)
    return len(index.parts["train"])


def _loader(packed: Path, seed: int, epoch: int, workers: int) -> DataLoader[Any]:
    config = DataConfig(name="stream", root=str(packed), augment=True, validation=0, workers=workers)
    data = ImageData(config, seed)
    data.first_epoch = epoch
    return data.train_dataloader()


def order_of(packed: Path, seed: int, epoch: int) -> str:
    """Stands for the order of an epoch's images."""
    sampler: Any = _loader(packed, seed, epoch, 0).sampler
    return hashlib.sha256(str([numbers for _, numbers in sampler]).encode()).hexdigest()[:16]


def stream(packed: Path, workers: int) -> Epoch:
    """Read the images of an epoch, and look at the memory from time to time."""
    loader = _loader(packed, 0, 0, workers)
    batches, every = iter(loader), max(1, len(loader) // SAMPLES)
    next(batches)
    started, images, memory = time.perf_counter(), 0, [_resident()]
    for number, (pixels, _) in enumerate(batches, 1):
        images += len(pixels)
        if number % every == 0:
            memory.append(_resident())
    return Epoch(rounded(images / (time.perf_counter() - started), 3), memory)


def _resident() -> float:
    pids = ["self", *(str(child.pid) for child in active_children())]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) for pid in pids)
    return rounded(pages * os.sysconf("SC_PAGE_SIZE") / MIB)


def epochs_table(result: Result) -> str:
    """Images per second, and memory at the start, in the middle and at the end."""
    lines = ["| loader | images/s | MiB at the start | in the middle | at the end |", "| --- | --- | --- | --- | --- |"]
    for workers, epoch in result["epochs"].items():
        memory = epoch["memory_mib"]
        places = (memory[0], memory[len(memory) // 2], memory[-1])
        sizes = " | ".join(f"{mib:.0f}" for mib in places)
        lines.append(f"| {workers} | {epoch['images_per_second']:,.0f} | {sizes} |")
    return "\n".join(lines)


def _draw(epochs: dict[int, Epoch], path: Path) -> None:
    figure = new_figure(7, 3.5)
    axes = figure.subplots()
    for workers, epoch in epochs.items():
        shares = [100 * number / (len(epoch.memory_mib) - 1) for number in range(len(epoch.memory_mib))]
        axes.plot(shares, epoch.memory_mib, label=f"{workers} workers, {epoch.images_per_second:,.0f} images/s")
    axes.set_xlabel("% of the epoch")
    axes.set_ylabel("resident memory, MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, path)
