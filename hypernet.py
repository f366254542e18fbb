"""Hypernetworks for reinforcement learning, and the eight critics that the paper compares.

A primary network turns the meta variable into the weights of a small dynamic network, which acts
on the base variable (Sec. 2, Fig. 1). With the state as meta and the action as base variable it is
a Q-function whose action gradient flows through the dynamic network alone (Sec. 3, SA-Hyper).
(released) marks what comes from the authors' code.

    critic = make_critic("sa-hyper", obs_dim=11, action_dim=3)
    q = critic(obs, action)                    # (B, 11), (B, 3) -> (B,)

    policy = HyperNetwork(meta_dim=1, base_dim=20, out_dim=6)
    weights = policy.generate(context)         # (T, 1): one set of weights per task, generated once
    action = policy.dynamic(weights, obs)      # (T, N, 20) -> (T, N, 6)
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Weights = tuple[tuple[Tensor, Tensor, Tensor], ...]  # (W, b, g) of each dynamic layer


class ResidualBlock(nn.Module):
    """`x + Linear(relu(Linear(relu(x))))`, shape (..., width) -> (..., width) (released)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear2(F.relu(self.linear1(F.relu(x))))


def make_primary(meta_dim: int, widths: tuple[int, ...] = (256, 512, 1024)) -> nn.Sequential:
    """Primary network: meta variable (..., meta_dim) -> latent (..., widths[-1]).

    A linear layer and two residual blocks for each width; weights start uniform in
    ±1 / (2 sqrt(fan_in)) (released, TD3; the released SAC has ±1 / sqrt(2 fan_in)).
    """
    layers = []
    for fan_in, width in zip((meta_dim, *widths), widths):
        layers += [nn.Linear(fan_in, width), ResidualBlock(width), ResidualBlock(width)]
    primary = nn.Sequential(*layers)
    for module in primary.modules():
        if isinstance(module, nn.Linear):
            bound = 1 / (2 * module.in_features**0.5)
            nn.init.uniform_(module.weight, -bound, bound)
    return primary


class Head(nn.Module):
    """One dynamic layer's weights as linear functions of the latent (Fig. 1).

    latent (..., latent_dim) -> W (..., fan_in, fan_out), b (..., 1, fan_out), g (..., 1, fan_out)
    """

    def __init__(self, latent_dim: int, fan_in: int, fan_out: int):
        super().__init__()
        self.fan_in, self.fan_out = fan_in, fan_out
        self.to_W = nn.Linear(latent_dim, fan_in * fan_out)
        self.to_b = nn.Linear(latent_dim, fan_out)
        self.to_g = nn.Linear(latent_dim, fan_out)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        W = self.to_W(latent).unflatten(-1, (self.fan_in, self.fan_out))
        with torch.autocast(latent.device.type, enabled=False):  # bfloat16 would round b and 1 + g
            latent = latent.to(self.to_b.weight.dtype)
            b, g = self.to_b(latent), self.to_g(latent)
        return W, b.unsqueeze(-2), g.unsqueeze(-2)  # an axis for samples that share the weights


class HyperNetwork(nn.Module):
    """Primary network, heads, and a dynamic network with one hidden layer (Sec. 2, Eq. 1)."""

    def __init__(
        self,
        meta_dim: int,
        base_dim: int,
        out_dim: int,
        dynamic_width: int = 256,
        primary_widths: tuple[int, ...] = (256, 512, 1024),
        init: str = "released",  # how the dynamic weights start, see init_heads
    ):
        super().__init__()
        self.primary = make_primary(meta_dim, primary_widths)
        self.hidden = Head(primary_widths[-1], base_dim, dynamic_width)
        self.output = Head(primary_widths[-1], dynamic_width, out_dim)
        init_heads(self, init)

    def generate(self, meta: Tensor) -> Weights:
        """w(meta), the weights of a dynamic network for each meta variable (..., meta_dim)."""
        latent = self.primary(meta)
        return self.hidden(latent), self.output(latent)

    @staticmethod
    def dynamic(weights: Weights, base: Tensor) -> Tensor:
        """Eq. 1 for N samples that share weights: base (..., N, base_dim) -> (..., N, out_dim).

        The paper's (1 + g) * (x W) is computed as x ((1 + g) * W), faster if many samples share W.
        """
        (W1, b1, g1), (W2, b2, g2) = weights
        h = F.relu(base @ ((1 + g1) * W1) + b1)
        with torch.autocast(h.device.type, enabled=False):  # as in Float32Linear
            return h @ ((1 + g2) * W2) + b2

    def forward(self, meta: Tensor, base: Tensor) -> Tensor:
        """f_{w(meta)}(base): (..., meta_dim), (..., base_dim) -> (..., out_dim)"""
        weights = self.generate(meta)  # one set for each sample, so N = 1 below
        return self.dynamic(weights, base.unsqueeze(-2)).squeeze(-2)


def init_heads(net: HyperNetwork, init: str) -> None:
    """Draws the heads' weights in one of three ways; their biases are 0, but for "bias".

    - "released": uniform in ±0.05 (hidden layer) and ±0.008 (output layer), the authors' constants.
    - "paper": uniform, with the bound that gives W the std of Kaiming-uniform, sqrt(2 / fan_in)
      (Sec. 5.2), for a standard normal meta variable; for b and g a tenth of that bound.
    - "bias": each head outputs its own bias alone, so that every meta variable starts with the same
      ordinary layer: W uniform in ±1 / sqrt(fan_in) like PyTorch's Linear, b = g = 0
      (Bias-HyperInit of Beck et al., 2022, Hypernetworks in Meta-Reinforcement Learning).
    """
    heads = (net.hidden, net.output)
    if init == "released":
        W_bounds = bg_bounds = (0.05, 0.008)
    elif init == "paper":
        with torch.no_grad():
            latent = net.primary(torch.randn(1024, net.primary[0].in_features))
        norm = latent.square().sum(-1).mean().sqrt().item()  # W's std is bound * norm / sqrt(3)
        W_bounds = [(6 / head.fan_in) ** 0.5 / norm for head in heads]
        bg_bounds = [bound / 10 for bound in W_bounds]
    elif init == "bias":
        W_bounds = bg_bounds = (0, 0)
    else:
        raise ValueError(f"init must be released, paper or bias, not {init!r}")
    for head, W_bound, bg_bound in zip(heads, W_bounds, bg_bounds):
        for linear, bound in ((head.to_W, W_bound), (head.to_b, bg_bound), (head.to_g, bg_bound)):
            nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(linear.bias)
        if init == "bias":
            nn.init.uniform_(head.to_W.bias, -(head.fan_in**-0.5), head.fan_in**-0.5)


class HyperCritic(nn.Module):
    """SA-Hyper, Q(s, a) = f_{w(s)}(a), or AS-Hyper, Q(s, a) = f_{w(a)}(s) (Sec. 3)."""

    def __init__(self, hyper: HyperNetwork, state_is_meta: bool):
        super().__init__()
        self.hyper, self.state_is_meta = hyper, state_is_meta

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        meta, base = (obs, action) if self.state_is_meta else (action, obs)
        return self.hyper(meta, base).squeeze(-1)


class Float32Linear(nn.Linear):
    """Float32 under autocast, too: bfloat16 would round a Q near 1,000 to a multiple of 4."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def make_mlp(input_dim: int, *widths: int) -> nn.Sequential:
    """Linear layers with relu between them: (..., input_dim) -> (..., 1)."""
    layers = []
    for fan_in, width in zip((input_dim, *widths), widths):
        layers += [nn.Linear(fan_in, width), nn.ReLU()]
    return nn.Sequential(*layers, Float32Linear(widths[-1], 1))


class ConcatCritic(nn.Module):
    """Q(s, a) = net([features(s), a]): obs (..., obs), action (..., action) -> (...)."""

    def __init__(self, net: nn.Module, features: nn.Module | None = None):
        super().__init__()
        self.features = features or nn.Identity()  # without features it is net([s, a])
        self.net = net

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([self.features(obs), action], -1)).squeeze(-1)


class D2RL(nn.Module):
    """Q-D2RL: four layers of 256, each of which also sees the network's input x (released)."""

    def __init__(self, input_dim: int):
        super().__init__()
        fan_in = 256 + input_dim
        self.layers = nn.ModuleList(nn.Linear(n, 256) for n in (input_dim, fan_in, fan_in, fan_in))
        self.output = Float32Linear(256, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.layers[0](x))
        for layer in self.layers[1:]:
            h = F.relu(layer(torch.cat([h, x], -1)))
        return self.output(h)


def make_critic(
    name: str,
    obs_dim: int,
    action_dim: int,
    dynamic_width: int = 256,
    primary_widths: tuple[int, ...] = (256, 512, 1024),
    init: str = "released",
) -> nn.Module:
    """One Q-network of Sec. 5.2: obs (..., obs_dim), action (..., action_dim) -> (...)."""
    dim = obs_dim + action_dim
    hyper = dict(primary_widths=primary_widths, dynamic_width=dynamic_width, init=init)
    match name:
        case "mlp":  # MLP-Standard
            return ConcatCritic(make_mlp(dim, 256, 256))
        case "mlp-small":  # as wide as the dynamic network
            return ConcatCritic(make_mlp(dim, 256))
        case "mlp-large":  # about as many weights as the hypernetwork
            return ConcatCritic(make_mlp(dim, 2900, 2900))
        case "resnet-features":  # one hidden layer, as in footnote 4; Sec. 5.2 has two
            features = make_primary(obs_dim, primary_widths)
            return ConcatCritic(make_mlp(primary_widths[-1] + action_dim, 256), features)
        case "resnet35":  # 4.6M weights (paper: 4.5M)
            blocks = [ResidualBlock(256) for _ in range(35)]
            net = nn.Sequential(nn.Linear(dim, 256), *blocks, nn.ReLU(), Float32Linear(256, 1))
            return ConcatCritic(net)
        case "d2rl":
            return ConcatCritic(D2RL(dim))
        case "as-hyper":
            return HyperCritic(HyperNetwork(action_dim, obs_dim, 1, **hyper), state_is_meta=False)
        case "sa-hyper":  # the method
            return HyperCritic(HyperNetwork(obs_dim, action_dim, 1, **hyper), state_is_meta=True)
    raise ValueError(f"unknown critic {name!r}")


# --------------------------------------------------------------------------------------------------
# The networks end here. What follows only makes training faster.


def tune(device: str, precision: str) -> None:
    """Makes the arithmetic fast; the scripts call it once, before PyTorch starts its threads.

    CPU: numbers below 1e-38 (float64: 2e-308) count as 0, in NumPy and MuJoCo too. Adam's averages
    of gradients that have become 0 end as such numbers, with which processors are slow. Float32
    products go to oneDNN in place of MKL. (Both measured: results/speed.md.) On processors with AMX
    this setting also rounds to bfloat16, which is detected and undone.
    CUDA: float32 products use TF32, unless the environment has NVIDIA_TF32_OVERRIDE=0.
    Warns if the device has no bfloat16 arithmetic.
    """
    torch.set_flush_denormal(True)  # PyTorch's threads inherit it when they start, so it is first
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    a = torch.linspace(-1, 1, 256 * 256).view(256, 256)
    if ((a @ a).double() - a.double() @ a.double()).abs().max() > 1e-3:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    if device == "cpu":
        native = any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" and not native:
        print("warning: no bfloat16 arithmetic here, float32 would be faster", file=sys.stderr)


class CudaGraph:
    """`function` as one CUDA graph, which is recorded at the fourth call and replayed from then on.

    The first three calls run as they are, so that the optimizers have their state. Inputs are
    tensors, or tuples of them, of fixed shapes; the next call overwrites what a call returns.
    """

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= 3:
            return self.function(*tree_map(torch.clone, inputs))  # contiguous, as in the graph
        if self.calls == 4:
            self.inputs, self.graph = tree_map(torch.clone, inputs), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        tree_map(Tensor.copy_, self.inputs, inputs)
        self.graph.replay()
        return self.outputs
