"""The compared methods: a row a method, saying how it builds a convolution, a norm (or none) and a head."""

from pws.methods.applied import APPLIED, apply_method
from pws.methods.method import Method
from pws.methods.registry import METHODS, build_method

__all__ = ["APPLIED", "METHODS", "Method", "apply_method", "build_method"]
