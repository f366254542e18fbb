"""hypernet.py against NumPy, finite differences and the paper's numbers."""

from functools import partial

import numpy as np
import pytest
import torch

from hypernet import CudaGraph, HyperNetwork, make_critic


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def numpy_hypernetwork(net: HyperNetwork, meta: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Eq. 1 for one meta and one base variable, from the state dict alone."""
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
        W, b, g = (linear(f"{head}.to_{k}", latent) for k in "Wbg")
        x = (1 + g) * (x @ W.reshape(len(x), len(b))) + b
        x = np.maximum(x, 0) if head == "hidden" else x
    return x


def small_hypernetwork(init: str = "released") -> HyperNetwork:
    return HyperNetwork(4, 3, 2, dynamic_width=7, primary_widths=(8, 12), init=init).double()


@pytest.mark.parametrize("init", ["paper", "bias", "released"])
def test_hypernetwork_equals_equation_1_in_numpy(init):
    net = small_hypernetwork(init)
    meta, base = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    expected = [numpy_hypernetwork(net, m.numpy(), x.numpy()) for m, x in zip(meta, base)]
    np.testing.assert_allclose(net(meta, base).detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_under_autocast_b_and_g_are_float32_so_that_1_plus_g_is_not_rounded():
    with torch.autocast("cpu", torch.bfloat16):
        weights = small_hypernetwork().float().generate(torch.randn(5, 4))
    assert {x.dtype for _, b, g in weights for x in (b, g)} == {torch.float32}


@pytest.mark.parametrize("meta_dim", [1, 11])
def test_paper_init_generates_weights_like_kaiming_uniform(meta_dim):
    weights = HyperNetwork(meta_dim, 3, 1, init="paper").generate(torch.randn(500, meta_dim))
    for (W, b, g), fan_in in zip(weights, (3, 256)):
        kaiming = torch.nn.init.kaiming_uniform_(torch.empty(10_000, fan_in)).std()
        assert W.std().item() == pytest.approx(kaiming.item(), rel=0.2)
        assert b.square().mean().sqrt() < 0.2 * kaiming and g.square().mean().sqrt() < 0.2 * kaiming


def test_bias_init_starts_every_input_with_the_same_ordinary_network():
    net = HyperNetwork(11, 3, 1, init="bias")
    weights = net.generate(torch.logspace(-1, 2, 50).unsqueeze(-1) * torch.randn(50, 11))
    for (W, b, g), fan_in in zip(weights, (3, 256)):
        assert torch.equal(W, W[:1].expand_as(W))
        assert W[0].std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
        assert W.abs().max() <= fan_in**-0.5  # uniform, like the weights of torch.nn.Linear
        assert not b.any() and not g.any()
    net(torch.randn(50, 11), torch.randn(50, 3)).sum().backward()
    assert net.hidden.to_W.weight.grad.abs().sum() > 0  # and it can learn to deviate


def test_released_init_has_the_published_constants():
    net = HyperNetwork(11, 3, 1, init="released")
    for linear in [m for m in net.primary.modules() if isinstance(m, torch.nn.Linear)]:
        bound = 1 / (2 * linear.in_features**0.5)
        assert bound * 0.9 < linear.weight.abs().max() <= bound
    for head, bound in ((net.hidden, 0.05), (net.output, 0.008)):
        for linear in (head.to_W, head.to_b, head.to_g):
            assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
            assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert (linear.bias == 0).all()


@pytest.mark.parametrize(
    "name, dims, parameters",
    [
        ("mlp", (11, 3), 69_889),
        ("mlp-small", (11, 3), 4_097),
        ("mlp-large", (11, 3), 8_459_301),  # paper: 9M
        ("resnet35", (11, 3), 4_609_537),  # paper: 4.5M
        ("sa-hyper", (11, 3), 7_748_610),
        ("sa-hyper", (27, 8), 9_064_706),  # Ant; paper: 9M
    ],
)
def test_parameter_counts(name, dims, parameters):
    critic = make_critic(name, *dims)
    assert sum(p.numel() for p in critic.parameters()) == parameters


@pytest.mark.parametrize(
    "name, num_hidden",
    [("mlp", 1), ("mlp-small", 0), ("mlp-large", 1), ("resnet35", 2 * 35), ("d2rl", 3)],
)
def test_concatenating_critics_equal_numpy(name, num_hidden):
    critic, relu = make_critic(name, 5, 2).double(), partial(np.maximum, 0)
    obs, action = torch.randn(3, 5).double(), torch.randn(3, 2).double()
    p = [tensor.numpy() for tensor in critic.state_dict().values()]
    first, *hidden, last = (lambda x, W=W, b=b: x @ W.T + b for W, b in zip(p[::2], p[1::2]))
    assert len(hidden) == num_hidden
    x = np.hstack([obs, action])
    h = first(x)
    if name == "resnet35":
        for linear1, linear2 in zip(hidden[::2], hidden[1::2]):
            h = h + linear2(relu(linear1(relu(h))))
    else:
        for linear in hidden:
            h = linear(np.hstack([relu(h), x]) if name == "d2rl" else relu(h))
    expected = last(relu(h)).squeeze(-1)
    np.testing.assert_allclose(critic(obs, action).detach().numpy(), expected, rtol=1e-10)


def test_hyper_critics_differ_in_which_input_is_meta_and_features_feed_a_single_hidden_layer():
    obs, action = torch.randn(3, 5).double(), torch.randn(3, 2).double()
    small = dict(primary_widths=(8, 16), dynamic_width=8)
    for name, inputs in (("sa-hyper", (obs, action)), ("as-hyper", (action, obs))):
        critic = make_critic(name, 5, 2, **small).double()
        torch.testing.assert_close(critic(obs, action), critic.hyper(*inputs).squeeze(-1))
    features = make_critic("resnet-features", 5, 2, **small).double()
    hidden, output = features.net[0], features.net[2]
    assert hidden.weight.shape == (256, 16 + 2) and output.weight.shape == (1, 256)
    latent = features.features(obs)
    expected = output(torch.relu(hidden(torch.cat([latent, action], -1)))).squeeze(-1)
    torch.testing.assert_close(features(obs, action), expected)


def test_a_cuda_graphs_first_calls_get_contiguous_tensors_like_the_recorded_ones():
    rows, graph = torch.randn(4, 6), CudaGraph(lambda *inputs: inputs)
    for _ in range(3):
        (half,) = graph(rows[:, 3:])
        assert half.is_contiguous() and torch.equal(half, rows[:, 3:])
