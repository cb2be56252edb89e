"""The step of the optimizers of `pws.optim`: in stock operators (reference), fused for the CPU (cpu) and for GPUs (triton)."""

from pws.kernels.choose import Step, installed, steps_of, use

__all__ = ["Step", "installed", "steps_of", "use"]
