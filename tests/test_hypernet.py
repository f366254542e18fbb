"""hypernet.py against NumPy, finite differences and the paper's numbers."""

import numpy as np
import pytest
import torch
from torch import nn

from hypernet import CRITICS, HyperNetwork, make_critic, tune


def numpy_hypernetwork(net: HyperNetwork, meta: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Eq. 1, neuron by neuron, for one meta and one base variable, from the state dict alone."""
    p = {name: tensor.numpy() for name, tensor in net.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return p[f"{name}.weight"] @ x + p[f"{name}.bias"]

    latent = meta
    for layer in (0, 3):
        latent = linear(f"primary.{layer}", latent)
        for block in (f"primary.{layer + 1}", f"primary.{layer + 2}"):
            h = np.maximum(linear(f"{block}.linear1", np.maximum(latent, 0)), 0)
            latent = latent + linear(f"{block}.linear2", h)
    x = base
    for head in ("hidden", "output"):
        W, b, g = (linear(f"{head}.{k}", latent) for k in "Wbg")
        fan_in, fan_out = len(x), len(b)
        out = np.empty(fan_out)
        for j in range(fan_out):
            xW = sum(x[i] * W[i * fan_out + j] for i in range(fan_in))
            out[j] = (1 + g[j]) * xW + b[j]
        x = np.maximum(out, 0) if head == "hidden" else out
    return x


def small_hypernetwork(**options) -> HyperNetwork:
    options = {"dynamic_width": 7, "primary_widths": (8, 12)} | options
    return HyperNetwork(4, 3, 2, **options).double()


@pytest.mark.parametrize("init", ["paper", "bias", "released"])
def test_hypernetwork_equals_equation_1_in_numpy(init):
    torch.manual_seed(0)
    net = small_hypernetwork(init=init)
    meta, base = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    expected = [numpy_hypernetwork(net, m.numpy(), x.numpy()) for m, x in zip(meta, base)]
    np.testing.assert_allclose(net(meta, base).detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_weights_generated_once_a_task_act_like_weights_generated_for_every_sample():
    torch.manual_seed(0)
    net = small_hypernetwork()
    meta, base = torch.randn(5, 4).double(), torch.randn(5, 6, 3).double()  # T tasks, N samples
    weights = net.generate(meta)
    assert weights[0][0].shape == (5, 3, 7) and weights[1][0].shape == (5, 7, 2)
    per_task = net.dynamic(weights, base)
    assert per_task.shape == (5, 6, 2)
    torch.testing.assert_close(per_task, net(meta, base))
    per_sample = net(meta.repeat_interleave(6, 0), base.flatten(0, 1))
    torch.testing.assert_close(per_task.flatten(0, 1), per_sample, rtol=1e-12, atol=1e-14)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    net = small_hypernetwork()
    meta, base = torch.randn(3, 4).double(), torch.randn(3, 3).double()
    meta.requires_grad_(True), base.requires_grad_(True)
    parameters = net.primary[0].weight, net.hidden.W.weight, net.hidden.g.weight, net.output.b.bias
    outputs = lambda meta, base, *_: net(meta, base)  # noqa: E731
    assert torch.autograd.gradcheck(outputs, (meta, base, *parameters))


@pytest.mark.parametrize("meta_dim", [1, 11])
def test_paper_init_generates_weights_like_kaiming_uniform(meta_dim):
    torch.manual_seed(meta_dim)
    net = HyperNetwork(meta_dim, 3, 1, init="paper")
    with torch.no_grad():
        hidden, output = net.generate(torch.randn(500, meta_dim))
    for (W, b, g), fan_in in ((hidden, 3), (output, 256)):
        kaiming = torch.nn.init.kaiming_uniform_(torch.empty(10_000, fan_in)).std()
        assert W.std().item() == pytest.approx(kaiming.item(), rel=0.2)
        assert b.square().mean().sqrt() < 0.2 * kaiming and g.square().mean().sqrt() < 0.2 * kaiming


def test_bias_init_starts_every_input_with_the_same_ordinary_network():
    torch.manual_seed(0)
    net = HyperNetwork(11, 3, 1, init="bias")
    weights = net.generate(torch.logspace(-1, 2, 50).unsqueeze(-1) * torch.randn(50, 11))
    for (W, b, g), fan_in in zip(weights, (3, 256)):
        assert torch.equal(W, W[:1].expand_as(W))
        linear = torch.nn.Linear(fan_in, 10_000).weight
        assert W[0].std().item() == pytest.approx(linear.std().item(), rel=0.1)
        assert W.abs().max() <= fan_in**-0.5
        assert not b.any() and not g.any()
    net(torch.randn(50, 11), torch.randn(50, 3)).sum().backward()
    assert net.hidden.W.weight.grad.abs().sum() > 0  # and it can learn to deviate


def test_released_init_has_the_published_constants():
    torch.manual_seed(0)
    net = HyperNetwork(11, 3, 1, init="released")
    for linear in (module for module in net.primary.modules() if isinstance(module, nn.Linear)):
        bound = 1 / (2 * linear.in_features**0.5)
        assert bound * 0.9 < linear.weight.abs().max() <= bound
    for head, bound in ((net.hidden, 0.05), (net.output, 0.008)):
        for linear in (head.W, head.b, head.g):
            assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
            assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert (linear.bias == 0).all()


HOPPER, ANT = (11, 3), (27, 8)


@pytest.mark.parametrize(
    "name, dims, parameters",
    [
        ("mlp", HOPPER, 69_889),  # 15*256 + 257*256 + 257
        ("mlp-small", HOPPER, 4_097),  # 15*256 + 257
        ("mlp-large", HOPPER, 8_459_301),  # paper: 9M
        ("resnet35", HOPPER, 4_609_537),  # paper: 4.5M
        ("sa-hyper", HOPPER, 7_748_610),
        ("sa-hyper", ANT, 9_064_706),  # paper: 9M
    ],
)
def test_parameter_counts(name, dims, parameters):
    critic = make_critic(name, *dims)
    assert sum(p.numel() for p in critic.parameters()) == parameters


SMALL = dict(primary_widths=(8, 16), dynamic_width=8)


@pytest.mark.parametrize("name", CRITICS)
def test_every_critic_is_a_q_function_of_obs_and_action(name):
    torch.manual_seed(0)
    critic = make_critic(name, 5, 2, **SMALL).double()
    obs, action = torch.randn(6, 5).double(), torch.randn(6, 2).double().requires_grad_(True)
    assert critic(obs, action).shape == (6,)
    assert not torch.allclose(critic(obs, action), critic(obs.roll(1, 0), action))
    # The gradient that the actor follows, against finite differences
    assert torch.autograd.gradcheck(lambda a: critic(obs, a), action, rtol=1e-4, atol=1e-7)


def numpy_concat_critic(name: str, p: dict, x: np.ndarray) -> float:
    def linear(key, x):
        return p[f"{key}.weight"] @ x + p[f"{key}.bias"]

    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    if name == "d2rl":
        h = relu(linear("net.layers.0", x))
        for i in (1, 2, 3):
            h = relu(linear(f"net.layers.{i}", np.concatenate([h, x])))
        return linear("net.output", h)[0]
    h = linear("net.0", x)
    if name == "resnet35":
        for i in range(1, 36):
            h = h + linear(f"net.{i}.linear2", relu(linear(f"net.{i}.linear1", relu(h))))
        return linear("net.37", relu(h))[0]
    for i in {"mlp": (2, 4), "mlp-small": (2,), "mlp-large": (2, 4)}[name]:
        h = linear(f"net.{i}", relu(h))
    return h[0]


@pytest.mark.parametrize("name", ["mlp", "mlp-small", "mlp-large", "resnet35", "d2rl"])
def test_concatenating_critics_equal_numpy(name):
    torch.manual_seed(0)
    critic = make_critic(name, 5, 2).double()
    obs, action = torch.randn(3, 5).double(), torch.randn(3, 2).double()
    p = {key: tensor.numpy() for key, tensor in critic.state_dict().items()}
    inputs = torch.cat([obs, action], -1).numpy()
    expected = [numpy_concat_critic(name, p, x) for x in inputs]
    np.testing.assert_allclose(critic(obs, action).detach().numpy(), expected, rtol=1e-10)


def test_hyper_critics_differ_in_which_input_is_meta_and_features_feed_a_single_hidden_layer():
    torch.manual_seed(0)
    obs, action = torch.randn(3, 5).double(), torch.randn(3, 2).double()
    sa = make_critic("sa-hyper", 5, 2, **SMALL).double()
    torch.testing.assert_close(sa(obs, action), sa.hyper(obs, action).squeeze(-1))
    as_ = make_critic("as-hyper", 5, 2, **SMALL).double()
    torch.testing.assert_close(as_(obs, action), as_.hyper(action, obs).squeeze(-1))
    features = make_critic("resnet-features", 5, 2, **SMALL).double()
    hidden, output = features.critic.net[0], features.critic.net[2]
    assert hidden.weight.shape == (256, 16 + 2) and output.weight.shape == (1, 256)
    latent = features.features(obs)
    expected = output(torch.relu(hidden(torch.cat([latent, action], -1)))).squeeze(-1)
    torch.testing.assert_close(features(obs, action), expected)


def test_tuned_matrix_products_are_accurate_and_slow_bfloat16_is_said(monkeypatch, capsys):
    for native, warned in ((True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda n=native: {"avx512_bf16": n})
        tune("cpu", "bfloat16")
        assert ("no bfloat16 arithmetic" in capsys.readouterr().err) is warned
        tune("cpu", "float32")
        assert not capsys.readouterr().err
    a = torch.randn(512, 512, generator=torch.manual_seed(0))
    torch.testing.assert_close((a @ a).double(), a.double() @ a.double(), rtol=1e-3, atol=1e-3)
