"""Private training with Opacus; needs the extra `private`. Importing it makes the samplers below known to Opacus."""

from pws.private import _register as _register  # first: it says what is missing
from pws.private.bound_steps import bound_steps
from pws.private.grad_sampler import conv_grad_sample, standardized_grad_sample
from pws.private.make_trainable import make_trainable
from pws.private.norm_sampler import conv_norm_sample, standardized_norm_sample

__all__ = [
    "bound_steps",
    "conv_grad_sample",
    "conv_norm_sample",
    "make_trainable",
    "standardized_grad_sample",
    "standardized_norm_sample",
]
