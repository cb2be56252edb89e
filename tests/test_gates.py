"""Gates scale what the network's main stream carries: a small variance of theirs is no vanishing signal."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pws
from pws.diagnosis import Diagnosis

X, Y = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
Block = Callable[[int], nn.Module]


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, gate: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Divided(Squeeze):
    """The sigmoid written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))))


class Mixed(Squeeze):
    """How much of a fixed map goes through is said by the gate."""

    def forward(self, x: Tensor) -> Tensor:
        share = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
        return torch.lerp(x.roll(1, 2), x, share)


class Channels(nn.Module):
    """ECA: a convolution along the channels."""

    def __init__(self, _: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.conv(x.mean((2, 3))[:, None]).sigmoid()[:, 0]
        return x.mul(weights[:, :, None, None].expand_as(x))


class Places(nn.Module):
    """CBAM: where to look, behind what to look for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, channels)
        self.places = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [self.second(F.relu(self.first(t))) for t in (x.mean((2, 3)), x.amax((2, 3)))]
        x = torch.sigmoid(pooled[0] + pooled[1])[:, :, None, None] * x
        return x * self.places(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class Doubled(nn.Module):
    """Two gates at a half leave a quarter."""

    def forward(self, x: Tensor) -> Tensor:
        return 4 * x


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


class Attention(nn.Module):
    """Queries and keys are small here, and decide only where the values go."""

    def __init__(self, channels: int, fused: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2).mT for layer in (self.query, self.key, self.value))
        told = F.scaled_dot_product_attention if self.fused else attend
        seen = told(q, k, v)
        return x + seen.mT.reshape(x.shape)


class Routed(nn.Module):
    """A convolution whose kernel is mixed by what a router says."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.router, self.kernels = nn.Linear(channels, 4), nn.Parameter(torch.randn(4, channels * channels) * 0.7)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.router(x.mean((0, 2, 3))).softmax(-1) @ self.kernels
        return F.conv2d(x, mixed.view(x.shape[1], x.shape[1], 1, 1))


GATES: dict[str, tuple[Block, set[str]]] = {
    "sigmoid": (Squeeze, {"fc1", "fc2"}),
    "hardsigmoid": (lambda c: Squeeze(c, F.hardsigmoid), {"fc1", "fc2"}),
    "1 + tanh": (lambda c: Squeeze(c, lambda t: 1 + t.tanh()), {"fc1", "fc2"}),
    "relu6": (lambda c: Squeeze(c, lambda t: F.relu6(t + 3) / 6), {"fc1", "fc2"}),
    "clamp": (lambda c: Squeeze(c, lambda t: (t / 6 + 0.5).clamp(0, 1)), {"fc1", "fc2"}),
    "division": (Divided, {"fc1", "fc2"}),
    "mixture": (Mixed, {"fc1", "fc2"}),
    "channels": (Channels, {"conv"}),
    "places": (lambda c: nn.Sequential(Places(c), Doubled()), {"first", "second", "places"}),
    "attention": (Attention, {"query", "key"}),
    "fused attention": (lambda c: Attention(c, fused=True), {"query", "key"}),
    "router": (Routed, {"router"}),
}


def net(block: Block, blocks: int = 3, seed: int = 0) -> nn.Sequential:
    """Convolutions of Kaiming's size, a block behind each; gates shrunk, so that they are far from the stream's scale."""
    torch.manual_seed(seed)
    body: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(blocks):
        body += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), block(16)]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


@torch.no_grad()
def shrink(model: nn.Module, names: set[str], by: float = 0.01) -> None:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            module.weight.mul_(by)


def explain(model: nn.Module, **settings: float) -> Diagnosis:
    return pws.diagnose(model, (X, Y), F.cross_entropy, **settings)


def gates_of(found: Diagnosis) -> set[str]:
    return {layer.name.rpartition(".")[2] for layer in found.layers if layer.gate}


@pytest.mark.parametrize("case", GATES)
def test_a_healthy_network_with_gates_is_healthy(case: str) -> None:
    block, names = GATES[case]
    for seed in range(3):
        model = net(block, seed=seed)
        shrink(model, names)
        found = explain(model)
        assert gates_of(found) == names
        reference = found.layers[0].output.variance
        assert any(layer.output.variance < reference / 1000 for layer in found.layers if layer.gate)
        assert found.verdict.cause == "healthy", found.verdict


@pytest.mark.parametrize("case", GATES)
def test_a_stream_that_vanishes_between_gates_does(case: str) -> None:
    block, names = GATES[case]
    model = net(block)
    shrink(model, {"2"})  # the second convolution
    found = explain(model).verdict
    assert found.cause == "vanishing"
    assert found.layer is not None
    assert found.layer.rpartition(".")[2] not in names


def test_gates_are_left_out_of_the_critical_rate() -> None:
    found = explain(net(Squeeze), lr=1e-3)
    rates = {layer.name: layer.critical_lr for layer in found.layers if not layer.gate}
    assert found.critical_lr == min(rate for rate in rates.values() if rate is not None)
    assert found.critical_layer.name in rates
    gates = [layer.critical_lr for layer in found.layers if layer.gate]
    assert all(rate is not None and rate < math.inf for rate in gates), "they have rates of their own"


def test_dead_units_in_a_gate_are_no_dead_stream() -> None:
    model = net(Squeeze)
    for module in model.modules():
        if isinstance(module, Squeeze):
            nn.init.constant_(module.fc1.bias, -100.0)
    assert explain(model).verdict.cause == "healthy"


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Standardized(nn.Module):
    """What is divided by its own size."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(1, keepdim=True) + 1e-3).sqrt()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.tanh() * 2.0


@pytest.mark.parametrize(
    "activation",
    [
        Swish,
        Scaled,
        Standardized,
        lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.3)),
        nn.Sigmoid,
        nn.ReLU6,
        nn.SiLU,
        nn.Hardswish,
    ],
)
def test_an_activation_is_no_gate(activation: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), activation(), nn.Linear(16, 16), activation())
    model.append(nn.Linear(16, 10))
    assert gates_of(explain(model)) == set()


def test_a_layer_that_is_a_gate_and_the_stream_is_none() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(768, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x.flatten(1))
            logits: Tensor = self.head(self.b(a.relu()) * a.sigmoid())
            return logits

    assert gates_of(explain(Both())) == set()


def test_a_monitor_does_not_judge_gates() -> None:
    model = net(Squeeze)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    with pws.Monitor(model, every=1) as monitor:
        for step in range(3):
            if step == 2:
                shrink(model, {"fc1", "fc2"})
            F.cross_entropy(model(X), Y).backward()
            sgd.step()
    variances = [{layer.name: layer.output.variance for layer in d.layers if layer.gate} for d in monitor.history]
    assert any(variances[2][name] < variances[0][name] / 1000 for name in variances[0])
    assert monitor.first_unhealthy is None


def test_the_graph_is_let_go() -> None:
    """What is known of gates must keep no tensor alive."""
    import gc
    import weakref

    model, seen = net(Squeeze), []
    model[0].register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output)))
    explain(model)
    gc.collect()
    assert seen[0]() is None


class Gated(nn.Module):
    """As WaveNet and the cells of an LSTM: both factors are bounded, and the one with a sign carries the signal."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.signal, self.scale = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.signal(x).tanh() * self.scale(x).sigmoid()


@pytest.mark.parametrize("weak", [False, True])
def test_of_two_bounded_factors_the_one_with_a_sign_is_the_stream(weak: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), Gated(32), Gated(32), Gated(32), nn.Linear(32, 10))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
    if weak:
        with torch.no_grad():
            model[2].signal.weight.mul_(1e-5)
    found = pws.diagnose(model, (torch.randn(32, 64), torch.arange(32) % 10), F.cross_entropy)
    gates = {layer.name for layer in found.layers if layer.gate}
    assert gates == {"1.scale", "2.scale", "3.scale"}
    assert (found.verdict.cause == "healthy") != weak


class TwoHeads(nn.Module):
    """A detector's shape: features, and two predictors; with `joined`, a layer takes both."""

    def __init__(self, *, joined: bool = False) -> None:
        super().__init__()
        self.body, self.boxes, self.scores = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)
        self.last = nn.Conv2d(6, 2, 1) if joined else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images).relu()
        result: Tensor = self.last(torch.cat([self.boxes(features), self.scores(features)], 1))
        return result


@pytest.mark.parametrize(("joined", "predictors"), [(False, {"boxes", "scores"}), (True, set())])
def test_several_layers_that_nothing_follows_predict(joined: bool, predictors: set[str]) -> None:
    torch.manual_seed(0)
    diagnosis = pws.diagnose(TwoHeads(joined=joined), torch.randn(4, 3, 8, 8), lambda out: out.square().mean())
    assert {layer.name for layer in diagnosis.layers if layer.predicts} == predictors


def test_a_predictor_that_learns_how_rare_objects_are_is_no_collapse() -> None:
    """Its mean takes over its variance, and the variance grows a thousandfold: both are what a detector learns first."""
    torch.manual_seed(0)
    model = TwoHeads()
    with torch.no_grad():  # features that are alike, and filters of nearly no mean
        model.body.weight.copy_(model.body.weight[:1] + 0.1 * model.body.weight)
        nn.init.normal_(model.scores.weight, std=1e-3)
        model.scores.weight.sub_(0.9 * model.scores.weight.mean(1, keepdim=True))
    optimizer = torch.optim.SGD(model.scores.parameters(), lr=20.0)
    images = torch.rand(4, 3, 8, 8)
    monitor = pws.Monitor(model, every=1, shift_bound=0.7)
    with monitor:
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.softplus(model(images)[:, 4:]).mean()
            monitor.observe(loss)
            loss.backward()
            optimizer.step()
    scores = [next(la for la in d.layers if la.name == "scores") for d in monitor.history]
    assert scores[-1].shift_share > 0.7 > scores[0].shift_share
    assert scores[-1].output.variance > 1e3 * scores[0].output.variance
    assert monitor.first_unhealthy is None
