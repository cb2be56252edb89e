"""The fused steps that this process can test: triton's in Triton's interpreter where that is asked for."""

from __future__ import annotations

import os
from typing import Final

import torch

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"
HERE: Final = ["triton"] if INTERPRETED else ["cpu", *(["triton"] if torch.cuda.is_available() else [])]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"
