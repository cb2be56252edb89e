"""Lightning's strategy for FSDP2, with checkpoints to which each process writes its part."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from pws._errors import PwsError, StoppedRunError, one_line
from pws.training.checkpoint_files import put_folder
from pws.training.checkpoints import CHECKSUM, FILES, REST, checksum_of, file_checksums, load_checkpoint
from pws.training.module import from_all_processes
from pws.training.recipe import Recipe
from pws.training.run_folder import has_checkpoint

WHOLE: Final = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with all processes in one data-parallel group.

    Checkpoints are folders of `torch.distributed.checkpoint`. They are copied to the CPU, and written while the training goes
    on. A whole one takes the place of the one before.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(tensor_parallel_size=1)
        self.recipe = recipe
        self._writing: Future[None] | None = None
        self._group: Any = None
        self._run = Path()

    def setup_environment(self) -> None:
        """Start the processes' group, and one that checkpoints alone use: they are written beside the training."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        self._group = distributed.new_group(backend="gloo")

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Begin to write it, once the one before is written."""
        self.wait()
        path = Path(self.broadcast(str(filepath)))
        self._run = path.parent.parent
        partial = path.with_name(f".{path.stem}.partial")
        if self.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.barrier()
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        tensors |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        rest = {**checkpoint, "recipe": asdict(self.recipe)}
        written = async_save(tensors, storage_writer=FileSystemWriter(partial), process_group=self._group)
        assert isinstance(written, Future)
        self._writing = _then(written, lambda: _finish(partial, path, rest) if self.is_global_zero else None)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one of several processes or of one, which is a file.

        Lightning reads a file too, but wrongly: it sends each tensor in its memory format to processes that take it for
        contiguous, numbers the optimizer's parameters as the network's, and looks for the first state where there is none.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        if not path.is_file():
            return super().load_checkpoint(path, weights_only)
        checkpoint = load_checkpoint(path)
        assert self.model is not None
        set_model_state_dict(self.model, _contiguous(checkpoint["state_dict"]), options=WHOLE)
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self._share_out(stored, optimizer)
        return checkpoint

    def _share_out(self, stored: dict[str, Any], optimizer: Optimizer) -> None:
        """Give each process its part of the state that one process stored of the same optimizer."""
        if not stored["state"]:
            for group, settings in zip(optimizer.param_groups, stored["param_groups"], strict=True):
                group.update({key: value for key, value in settings.items() if key != "params"})
            return
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        numbered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        named: dict[str, Any] = {
            "state": {numbered[number]: _contiguous(state) for number, state in stored["state"].items()},
            "param_groups": [
                {**group, "params": [numbered[number] for number in group["params"]]}
                for group in stored["param_groups"]
            ],
        }
        set_optimizer_state_dict(self.model, optimizer, named, options=WHOLE)

    def wait(self) -> None:
        """Until the checkpoint is written; raise the same error in all processes if it could not be."""
        if self._writing is None:
            return
        error, self._writing = self._writing.exception(), None
        seen = [reason for reason in from_all_processes(error and _reason(error)) if reason]
        if not seen:
            return
        failed = (
            f"a checkpoint could not be written: {seen[0]}. Make room on the disk, or mend what else is wrong there"
        )
        if self.broadcast(has_checkpoint(self._run)):
            raise StoppedRunError(f"{failed}; the checkpoint before is whole, and --resume goes on.")
        raise PwsError(f"{failed}. There is none before it: start the run again.")

    def on_train_end(self) -> None:
        """Leave nothing half written."""
        self.wait()

    def teardown(self) -> None:
        """Leave nothing half written, where an error ends the training."""
        if self._writing is not None:
            self._writing.exception()
        super().teardown()


def _contiguous(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.contiguous() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def _reason(error: BaseException) -> str:
    """What went wrong, in the process where it did."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return one_line(error)


def _then(future: Future[Any], action: Callable[[], None]) -> Future[None]:
    """What ends with `action`, which runs in the thread that `future` ends in."""
    ended: Future[None] = Future()

    def follow(done: Future[Any]) -> None:
        try:
            done.result()
            action()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    future.add_done_callback(follow)
    return ended


def _finish(partial: Path, path: Path, rest: Mapping[str, Any]) -> None:
    """Add what no process holds a part of, with the checksums of all files, and put the folder in its place."""
    content = {**rest, FILES: file_checksums(partial)}
    torch.save({**content, CHECKSUM: checksum_of(content)}, partial / REST)
    put_folder(partial, path)
