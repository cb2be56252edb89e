"""Switchable Normalization: a learnt mixture of Instance, Layer and Batch Norm's statistics. No library has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SwitchNorm2d(nn.Module):
    """Normalize `(N, C, H, W)` with a mixture of three means and three (biased) variances.

        y = weight * (x - sum_k p_k mean_k) / sqrt(sum_k q_k var_k + eps) + bias,      k in {instance, layer, batch}

    `p` and `q` are softmaxes of three trainable logits each, equal at the start. Instance statistics are over `(H, W)`, layer
    statistics over `(C, H, W)`, batch statistics over `(N, H, W)`; in eval mode the batch's are running averages with
    `momentum`, as in `torch.nn.BatchNorm2d`.

    Source: Luo, Ren, Peng, Zhang, Li, "Differentiable Learning-to-Normalize via Switchable Normalization", ICLR 2019. They keep
    running averages with momentum 0.003, or average them afterwards; ours follow BatchNorm's default, 0.1.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.mean_logits = nn.Parameter(torch.zeros(3))
        self.var_logits = nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, input: Tensor) -> Tensor:
        """The normalized input."""
        mean_NC = input.mean((2, 3))
        var_NC = input.var((2, 3), correction=0)
        square_NC = var_NC + mean_NC.square()
        mean_N1 = mean_NC.mean(1, keepdim=True)
        var_N1 = square_NC.mean(1, keepdim=True) - mean_N1.square()
        mean_1C, var_1C = self._batch_statistics(mean_NC, square_NC)
        p, q = self.mean_logits.softmax(0), self.var_logits.softmax(0)
        mean = p[0] * mean_NC + p[1] * mean_N1 + p[2] * mean_1C
        var = q[0] * var_NC + q[1] * var_N1 + q[2] * var_1C
        scale_NC = self.weight * (var + self.eps).rsqrt()
        shift_NC = self.bias - mean * scale_NC
        return input * scale_NC[:, :, None, None] + shift_NC[:, :, None, None]

    def _batch_statistics(self, mean_NC: Tensor, square_NC: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.running_mean[None], self.running_var[None]
        mean_1C = mean_NC.mean(0, keepdim=True)
        var_1C = square_NC.mean(0, keepdim=True) - mean_1C.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean_1C[0], self.momentum)
            self.running_var.lerp_(var_1C[0], self.momentum)
        return mean_1C, var_1C
