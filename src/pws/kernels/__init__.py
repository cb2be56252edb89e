"""The standardization, fused: one backend a device, behind one operator."""

from pws.kernels.registry import BACKENDS, empty_cache, installed, use

__all__ = ["BACKENDS", "empty_cache", "installed", "use"]
