"""The standardization, fused: one backend a device, behind one operator."""

from pws.kernels.registry import BACKENDS, installed, use

__all__ = ["BACKENDS", "installed", "use"]
