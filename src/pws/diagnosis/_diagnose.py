"""`pws.diagnose`: one forward and one backward pass, explained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from pws._batch import REJECTIONS, Batch, Forward, Loss, batch_of, check_finite
from pws._errors import PwsError, one_line
from pws._preserve import preserved
from pws.diagnosis.diagnosis import Diagnosis
from pws.diagnosis.layer import LayerDiagnosis
from pws.diagnosis.layer_statistics import layer_diagnosis
from pws.diagnosis.measurement import Measurement, Settings
from pws.diagnosis.recording.marked import check_optimizer
from pws.diagnosis.recording.recorder import Recorder
from pws.optim.sharding import is_sharded

LAYER_KINDS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def diagnose(
    model: nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    forward: Forward | None = None,
    lr: float | None = None,
    momentum: float = 0.0,
    steps: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
) -> Diagnosis:
    """Explain a model on a batch: variance transmission, average gradients, critical learning rates, and a verdict.

    It runs one forward and one backward pass in the model's present mode and under the active autocast. To explain training,
    put the model in training mode: BatchNorm then uses the batch. The model, its gradients, its buffers and every random
    generator are left exactly as they were, also after an error.

    Args:
        model: any module. Its layers are found by the operations they call (convolutions, transposed convolutions, linear
            maps), whatever computes their kernels.
        batch: `(inputs, targets)` as a DataLoader gives it, or the inputs alone. Inputs are a tensor, a tuple of arguments, a
            list of images or a dict of arguments. A model that has an argument for targets gets them.
        loss: `loss(outputs, targets)` or `loss(outputs)`. It returns a scalar, or a dict of losses, which are summed. Leave it
            out if the model returns its losses: a dict of them, or an output called `loss`.
        forward: `forward(model, batch)` returns the outputs, for a batch of any other form. The loss then takes the batch in
            place of the targets, unless the batch is a pair.
        lr: the learning rate to judge. Without it the verdict names the smallest critical one.
        momentum: the momentum of SGD, for the prediction.
        steps: how many steps ahead the shift share is predicted.
        optimizer: the optimizer of a model with marked layers (`pws.mark`), after some training. It holds `w`, whose size
            decides how far a step moves the kernel. Without it, the size is taken that an optimizer starts with. Other models
            need none.

    Raises:
        PwsError: the model has no layer with a weight, rejects the batch or is not yet initialized. Or its weights are split
            over processes. Or NaN or infinity of the batch reach a layer or the loss. Or the loss is not a scalar, or does not
            depend on the model's parameters. Or the optimizer is one of torch's own and the model has marked layers.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
        >>> diagnosis = diagnose(model, (images, labels), nn.functional.cross_entropy)
        >>> [layer.name for layer in diagnosis.layers]
        ['0', '3']
    """
    model = bare(model)
    check_model(model)
    check_optimizer(model, optimizer)
    settings = Settings(lr, momentum, steps, training=model.training)
    parsed = batch_of(batch, forward)
    recorder = Recorder(model, optimizer)
    try:
        with torch.inference_mode(False), torch.enable_grad(), preserved(model):
            with recorder.forward():
                outputs = outputs_of(model, parsed)
            if not recorder.layers:
                raise PwsError(_nothing_ran(model))
            if not recorder.first_input_is_finite:
                check_finite(parsed.inputs, "input")
            value = loss_of(loss, parsed, outputs)
            recorder.forget_backward()
            if torch.isfinite(value):
                _backward(value, model)
            elif all(record.finite for record in recorder.layers.values()):
                check_finite(parsed.targets, "target")
            return diagnosis_of(recorder, value, settings)
    finally:
        recorder.close()


def diagnosis_of(
    recorder: Recorder, loss: Tensor | None, settings: Settings, *, step: int | None = None, loss_scale: float = 1.0
) -> Diagnosis:
    """Turn what a recorder has seen into a diagnosis."""
    layers: list[LayerDiagnosis] = []
    for record in recorder.layers.values():
        change = None if record.step_map is None else record.step_map.kernel_change(recorder.steps)
        if change is not None:
            change = record.layout.filters(change.double()) / loss_scale
        product = layers[-1].transmission_product if layers else 1.0
        layers.append(layer_diagnosis(record, change, product, loss_scale))
    ran = {name for name, _ in recorder.layers}
    held = [(name, module) for name, module in recorder.model.named_modules() if isinstance(module, LAYER_KINDS)]
    # The output projection of torch's attention is run inside an operation of its own, unseen.
    unused = [n for n, module in held if n not in ran and not isinstance(module, NonDynamicallyQuantizableLinear)]
    measurement = Measurement(
        layers=tuple(layers),
        model=type(recorder.model).__name__,
        loss=None if loss is None else float(loss.detach()),
        unused=tuple(unused),
        settings=settings,
        step=step,
    )
    return Diagnosis.of(measurement)


def bare(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and the parallel wrappers."""
    while isinstance(model, DataParallel | DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def check_model(model: nn.Module) -> None:
    """Raise `PwsError` for a model that can't be diagnosed."""
    if not isinstance(model, nn.Module):
        raise PwsError(f"diagnose explains a torch.nn.Module; got a {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise PwsError("a scripted model hides its operations; pass the model that it was made from.")
    if any(map(is_sharded, model.parameters())) or any(map(_is_fsdp, model.modules())):
        raise PwsError(
            "a diagnosis needs whole weights and their gradients, and those of this model are split over processes "
            "(fully_shard, FSDP or tensor parallelism). pws.Monitor measures it while it trains; or load its checkpoint in one "
            "process."
        )
    if any(parameter.is_complex() for parameter in model.parameters()):
        raise PwsError("a diagnosis is defined for real weights; the model has complex ones.")
    if any(parameter.device.type == "mps" for parameter in model.parameters()):
        raise PwsError(
            'statistics are pooled in float64, which mps does not have. Move the model to the CPU: .to("cpu").'
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise PwsError(
            f"the model must be initialized; {lazy[0]!r} and {len(lazy) - 1} more parameters are lazy and get their shape from "
            "the first batch. Run the model once before the diagnosis."
        )


def _is_fsdp(module: nn.Module) -> bool:
    return type(module).__name__ == "FullyShardedDataParallel"  # importing it would set up torch.distributed


def outputs_of(model: nn.Module, batch: Batch) -> Any:
    """What the model returns; raises `PwsError` if it rejects the batch."""
    torch.clear_autocast_cache()  # a forward that is decorated with autocast switches the cache on again
    try:
        return batch.outputs(model)
    except PwsError:
        raise
    except REJECTIONS as error:
        raise PwsError(
            f"the model rejects the batch: {type(error).__name__}: {one_line(error).rstrip('.')}. Pass what the model is "
            "called with, on its device and in its dtype: (inputs, targets), several inputs as a tuple or dict; or forward=, a "
            "function of (model, batch)."
        ) from error


def loss_of(loss: Loss | None, batch: Batch, outputs: Any) -> Tensor:
    """The scalar; raises `PwsError` if it is none, or has no gradient."""
    try:
        value = batch.loss(loss, outputs)
    except PwsError:
        raise
    except REJECTIONS as error:
        call = "loss(outputs, targets)" if batch.has_targets else "loss(outputs), for the batch holds no targets,"
        failed = f"{type(error).__name__}: {one_line(error).rstrip('.')}"
        raise PwsError(
            f"{call} must give the scalar that is trained on; it failed with {failed}. The outputs are {_shape(outputs)}"
            + (f", the targets {_shape(batch.targets)}." if batch.has_targets else ".")
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        remedy = "Take its mean, as in training." if loss is not None else "Pass loss=: the model's outputs are none."
        raise PwsError(f"the loss must be a scalar tensor; got {_shape(value)}. {remedy}")
    if not value.requires_grad:
        raise PwsError(
            "the loss must depend on the model's parameters, or there is no gradient to explain; it does not. Likely causes: "
            "all parameters are frozen, the model runs under torch.no_grad or detaches its output, or the loss ignores it."
        )
    return value.reshape(())


def _backward(value: Tensor, model: nn.Module) -> None:
    """Run the recorder's hooks; no `.grad` is touched."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        found = torch.autograd.grad(value, trainable, allow_unused=True) if trainable else ()
    except RuntimeError as error:
        raise PwsError(
            f"the backward pass fails: {one_line(error).rstrip('.')}. It is run by torch.autograd.grad, which reentrant "
            "checkpointing (use_reentrant=True) does not allow."
        ) from error
    if not any(gradient is not None for gradient in found):
        raise PwsError(
            "the loss must depend on the model's parameters, or there is no gradient to explain; none of them got one. Likely "
            "causes: the loss is computed from something else than the model's outputs, or they were detached."
        )


def _nothing_ran(model: nn.Module) -> str:
    known = ", ".join(kind.__name__ for kind in LAYER_KINDS)
    held = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
    return (
        f"a diagnosis needs a layer with a weight ({known}, or anything that calls their operations); none ran in "
        f"{type(model).__name__}, which holds {', '.join(held[:8]) or 'nothing'}. Pass the model that is trained."
    )


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, value))}"
    return f"a {type(value).__name__}"
