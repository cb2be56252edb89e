"""Images into shards: in parallel, resumable, verified. litdata's writer makes each shard, and its readers read them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar

from pws._errors import PwsError
from pws._files import remove_partials, write_whole
from pws.training.pack_sources import Entry, Source
from pws.training.shards import INDEX, LITDATA_INDEX, VERSION, Shard, ShardIndex, shard_of
from pws.training.stream import litdata

RECORDS: Final = ".packing"
"""The folder in which a packing keeps, until it ends, what it packs and which shards are done."""
Progress = Callable[[str, int, int], None]
"""Takes what is done, how much of it, of how much."""
T = TypeVar("T")
R = TypeVar("R")
Each = Callable[[Callable[[T], R], Iterable[T]], Iterable[R]]


@dataclass(frozen=True)
class ShardTask:
    """A shard to be written."""

    file: Path
    record: Path
    entries: Sequence[Entry]


@dataclass(frozen=True)
class Packed:
    """A shard that was written: what is kept of it until the packing ends."""

    shard: Shard
    chunk: dict[str, Any]
    """What litdata's index says of it."""
    config: dict[str, Any]
    """What litdata's index says of all."""


def pack(source: Source, out: Path, jobs: int, progress: Progress) -> ShardIndex:
    """Write the shards of `source` into `out`, and what describes them; go on with an unfinished packing.

    Args:
        source: the images.
        out: the folder; new, empty, or left by an unfinished packing of the same images.
        jobs: processes.
        progress: is told of it.

    Raises:
        PwsError: `out` holds something else, or a shard is not what was written.
    """
    litdata()
    begin(source, out)
    with _held(out):
        _clean(source.parts, out)
        tasks = {part: list(_tasks(source, part, out)) for part in source.parts}
        everything = [task for part in tasks.values() for task in part]
        with _processes(jobs) as each:
            _write(everything, each, progress)
            _verify(everything, each, progress)
        return _finish(source, tasks, out)


def _finish(source: Source, tasks: dict[str, list[ShardTask]], out: Path) -> ShardIndex:
    """Write what describes the shards."""
    packed = {part: [_read(task.record) for task in own] for part, own in tasks.items()}
    index = ShardIndex(source.about, {part: [one.shard for one in own] for part, own in packed.items()}, source.sizes)
    for part, own in packed.items():
        write_whole(out / part / LITDATA_INDEX, _litdata_index(own, source.digest))
    write_whole(out / INDEX, index.text())
    shutil.rmtree(out / RECORDS)
    return index


def begin(source: Source, out: Path) -> None:
    """Make the folder, or take up what an unfinished packing has left in it.

    Raises:
        PwsError: it holds something else.
    """
    said = json.dumps({"version": VERSION, "source": source.name, "digest": source.digest, **_sizes(source)})
    began = out / RECORDS / "source.json"
    if (out / INDEX).exists():
        raise PwsError(
            f"{out} holds packed images already, and nothing is overwritten. Name another folder, or remove it."
        )
    if began.is_file():
        if began.read_text(encoding="utf-8") != said:
            raise PwsError(
                f"{out} holds an unfinished packing of other images, or with another --size. Give the command that began it, "
                "name another folder, or remove it."
            )
    elif out.exists() and (not out.is_dir() or any(path.name != RECORDS for path in out.iterdir())):
        raise PwsError(f"{out} exists already, and nothing is overwritten. Name another folder, or remove it.")
    began.parent.mkdir(parents=True, exist_ok=True)
    write_whole(began, said)
    for part in source.parts:
        (out / RECORDS / part).mkdir(exist_ok=True)
        (out / part).mkdir(exist_ok=True)


def _clean(parts: Iterable[str], out: Path) -> None:
    """Remove what a killed process has left half written."""
    for part in parts:
        for left in (path for path in (out / RECORDS / part).iterdir() if path.is_dir()):
            shutil.rmtree(left)
        remove_partials(out / part / LITDATA_INDEX)
    remove_partials(out / INDEX)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold the folder for this process, which another one can't then write to."""
    with (out / RECORDS / "lock").open("a") as lock:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise PwsError(f"another process is packing into {out}. Wait for it, or name another folder.") from None
        yield


def _sizes(source: Source) -> dict[str, int | None]:
    first = source.parts["train"][0]
    return {"images": source.images, "shard_images": source.shard_images(), "size": getattr(first, "size", None)}


def _tasks(source: Source, part: str, out: Path) -> Iterator[ShardTask]:
    entries, count = source.parts[part], source.shard_images()
    for number, start in enumerate(range(0, len(entries), count)):
        name = f"chunk-0-{number}"  # as litdata's own
        record = out / RECORDS / part / f"{name}.json"
        yield ShardTask(out / part / f"{name}.bin", record, entries[start : start + count])


@contextmanager
def _processes(jobs: int) -> Iterator[Each[Any, Any]]:
    if jobs == 1:
        yield map
        return
    # Not multiprocessing's Pool, which waits for ever for the shard of a process that was killed.
    with ProcessPoolExecutor(jobs, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield lambda work, tasks: (
                one.result() for one in as_completed([pool.submit(work, task) for task in tasks])
            )
        except BrokenProcessPool as error:
            raise PwsError(
                "a process died, as they do when memory runs out. Lower --jobs; the same command goes on."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write(tasks: list[ShardTask], each: Each[ShardTask, int], progress: Progress) -> None:
    left = [task for task in tasks if not _is_done(task)]
    total = sum(len(task.entries) for task in tasks)
    done = total - sum(len(task.entries) for task in left)
    progress("packing", done, total)
    for count in each(write_shard, left):
        done += count
        progress("packing", done, total)


def _verify(tasks: list[ShardTask], each: Each[tuple[Path, Path], str], progress: Progress) -> None:
    for number, fault in enumerate(each(fault_of, [(task.file, task.record) for task in tasks]), 1):
        if fault:
            raise PwsError(f"{fault} The disk may be failing. The same command writes that shard again.")
        progress("verifying", number, len(tasks))


def write_shard(task: ShardTask) -> int:
    """Write a shard whole or not at all; returns how many images it holds."""
    with TemporaryDirectory(dir=task.record.parent) as temporary:
        writer = litdata().streaming.writer.BinaryWriter(temporary, chunk_size=len(task.entries))
        for number, entry in enumerate(task.entries):
            writer[number] = entry.stored()
        (written,) = writer.done()
        (said,) = (json.loads(path.read_text(encoding="utf-8")) for path in Path(temporary).glob(f"*{LITDATA_INDEX}"))
        with open(written, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(written, task.file)
    chunk = {**said["chunks"][0], "filename": task.file.name}
    write_whole(task.record, json.dumps(asdict(Packed(shard_of(task.file), chunk, said["config"]))))
    return len(task.entries)


def fault_of(paths: tuple[Path, Path]) -> str:
    """What is wrong with a shard's file, whose record is removed then; empty if it is what its record says."""
    file, record = paths
    packed = _read(record)
    if shard_of(file) == packed.shard and packed.shard.images == packed.chunk["chunk_size"]:
        return ""
    record.unlink()
    return f"the shard {file} is not what was written (its number of images, its length or its checksum)."


def _is_done(task: ShardTask) -> bool:
    return task.record.is_file() and task.file.is_file() and task.file.stat().st_size == _read(task.record).shard.bytes


def _read(record: Path) -> Packed:
    content = json.loads(record.read_text(encoding="utf-8"))
    return Packed(Shard(**content["shard"]), content["chunk"], content["config"])


def _litdata_index(packed: list[Packed], digest: str) -> str:
    """litdata's index.json, so that its own readers read the shards too."""
    content = {"chunks": [one.chunk for one in packed], "config": packed[0].config, "updated_at": digest}
    return json.dumps(content, sort_keys=True)
