"""The step of the optimizers of `pws.optim`: in stock operators (reference), fused for the CPU (cpu) and for GPUs (triton)."""

from pws.kernels.choose import Step, chosen, installed, steps_of, use
from pws.kernels.layer import AdamWRates, Layer, SGDRates

__all__ = ["AdamWRates", "Layer", "SGDRates", "Step", "chosen", "installed", "steps_of", "use"]
