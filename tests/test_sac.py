"""The update of sac_hyper.py: log-probabilities, losses, and where gradients go."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, assert_same_run, cosine, graph_of, small
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from sac_hyper import Actor, Agent, Args, act, actor_loss, alpha_loss, critic_loss, explore, update

SCRIPT = ROOT / "sac_hyper.py"


def make_agent(critic: str, **options) -> tuple[Agent, Args]:
    torch.manual_seed(0)
    args = Args(critic=critic, **{"primary_widths": (8, 16), "dynamic_width": 8} | options)
    return Agent(3, 2, args), args


def make_batch(size: int = 10) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    torch.manual_seed(1)
    obs, next_obs = torch.randn(2, size, 3)
    action, terminated = 2 * torch.rand(size, 2) - 1, (torch.rand(size) < 0.3).float()
    return (obs, action, torch.randn(size), next_obs, terminated), torch.randn(2, size, 2)


def make_optimizers(agent: Agent, lr: float = 1e-3) -> dict[str, torch.optim.Adam]:
    networks = {"critic": agent.critics.parameters(), "actor": agent.actor.parameters()}
    networks["alpha"] = [agent.log_alpha]
    return {name: torch.optim.Adam(p, lr, fused=True) for name, p in networks.items()}


def actor_with(mean: list[float], log_std: list[float]) -> Actor:
    """An actor whose distribution is the same in every state, in float64."""
    actor = Actor(3, len(mean)).double()
    actor.output.weight.data.zero_()
    actor.output.bias.data = torch.tensor([*mean, *log_std]).double()
    return actor


@pytest.mark.parametrize("reach", [1.0, 12.0], ids=["inside", "at the bounds"])
def test_log_probability_equals_torch_distributions(reach):
    mean, log_std = [0.3, -0.5], [math.log(0.7), math.log(1.5)]
    actor = actor_with(mean, log_std)
    torch.manual_seed(0)
    noise = reach * torch.randn(1000, 2).double()
    action, log_prob = actor.sample(torch.randn(1000, 3).double(), noise)
    normal = Normal(torch.tensor(mean).double(), torch.tensor(log_std).double().exp())
    tanh = TanhTransform(cache_size=1)  # the cache makes the inverse exact
    squashed = tanh(normal.mean + normal.stddev * noise)
    distribution = TransformedDistribution(Independent(normal, 1), [tanh])
    torch.testing.assert_close(action, squashed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_prob, distribution.log_prob(squashed), rtol=1e-10, atol=1e-10)
    assert log_prob.isfinite().all()


def test_log_std_is_clamped():
    _, log_std = actor_with([0, 0], [5, -50]).mean_and_log_std(torch.randn(4, 3).double())
    assert (log_std == torch.tensor([2, -20])).all()


def test_deterministic_action_is_tanh_of_the_mean():
    actor = actor_with([0.4, -1.2], [0, 0]).float()
    obs, zero, noise = np.float32([0, 0, 0]), np.float32([0, 0]), np.float32([0.5, -1])
    expected = np.tanh([0.4, -1.2])
    np.testing.assert_allclose(act(actor, obs, "cpu"), expected, rtol=1e-5)
    np.testing.assert_allclose(explore(actor, obs, zero, "cpu"), expected, rtol=1e-5)
    noisy = np.tanh([0.4 + 0.5, -1.2 - 1.0])
    np.testing.assert_allclose(explore(actor, obs, noise, "cpu"), noisy, rtol=1e-5)


@pytest.mark.parametrize("critic", ["mlp", "resnet-features", "as-hyper", "sa-hyper"])
def test_each_loss_reaches_its_own_parameters_alone(critic):
    agent, args = make_agent(critic)
    batch, noise = make_batch()
    loss = critic_loss(agent, batch, noise[0], args)
    assert graph_of(loss)[0] == {id(p) for p in agent.critics.parameters()}
    assert graph_of(alpha_loss(agent, torch.randn(10), 2))[0] == {id(agent.log_alpha)}
    loss, log_prob = actor_loss(agent, batch, noise[1], args)
    assert graph_of(loss)[0] == {id(p) for p in agent.actor.parameters()}
    assert not log_prob.requires_grad
    loss.backward()
    assert all(p.grad is None for p in (*agent.critics.parameters(), agent.log_alpha))
    assert all(p.requires_grad for p in agent.critics.parameters())


@pytest.mark.parametrize("critic", ["mlp", "sa-hyper"])
def test_losses_equal_their_equations_sample_by_sample(critic):
    agent, args = make_agent(critic, gamma=0.9)
    agent.log_alpha.data.fill_(-0.7)
    alpha = math.exp(-0.7)
    (obs, action, reward, next_obs, terminated), noise = make_batch()
    expected_critic = expected_actor = 0.0
    log_probs = []
    for i in range(10):
        a, log_prob = agent.actor.sample(next_obs[i], noise[0, i])
        q = min(q(next_obs[i][None], a[None]).item() for q in agent.target_critics)
        y = reward[i].item() + 0.9 * (1 - terminated[i].item()) * (q - alpha * log_prob.item())
        for q in agent.critics:
            expected_critic += (q(obs[i][None], action[i][None]).item() - y) ** 2 / 10
        a, log_prob = agent.actor.sample(obs[i], noise[1, i])
        q = min(q(obs[i][None], a[None]).item() for q in agent.critics)
        expected_actor += (alpha * log_prob.item() - q) / 10
        log_probs.append(log_prob.item())
    batch = (obs, action, reward, next_obs, terminated)
    loss = critic_loss(agent, batch, noise[0], args)
    assert loss.item() == pytest.approx(expected_critic, rel=1e-4)
    loss, log_prob = actor_loss(agent, batch, noise[1], args)
    assert loss.item() == pytest.approx(expected_actor, rel=1e-4)
    np.testing.assert_allclose(log_prob.numpy(), log_probs, rtol=1e-4, atol=1e-5)
    expected_alpha = -alpha * (np.mean(log_probs) - 2)
    assert alpha_loss(agent, log_prob, 2).item() == pytest.approx(expected_alpha, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.2, 0.0])
def test_without_autotune_the_temperature_stays(alpha):
    agent, args = make_agent("mlp", autotune=False, alpha=alpha)
    batch, noise = make_batch()
    losses = update(agent, make_optimizers(agent), batch, noise, args)
    assert set(losses) == {"critic_loss", "actor_loss"}
    assert all(loss.isfinite() for loss in losses.values())
    assert agent.log_alpha.exp().item() == pytest.approx(alpha)


def test_one_update_moves_everything_and_targets_by_tau():
    agent, args = make_agent("sa-hyper", tau=0.1)
    batch, noise = make_batch()
    before = copy.deepcopy(agent)
    losses = update(agent, make_optimizers(agent), batch, noise, args)
    assert set(losses) == {"critic_loss", "actor_loss", "alpha_loss", "alpha"}
    modules = (agent.target_critics, agent.critics, before.target_critics)
    for new, p, old in zip(*(module.parameters() for module in modules)):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p)
    assert not torch.equal(agent.actor.hidden1.weight, before.actor.hidden1.weight)
    assert agent.log_alpha != before.log_alpha
    assert not any(p.requires_grad or p.grad_fn for p in agent.targets)  # or memory would grow


@pytest.mark.parametrize("critic", ["mlp", "sa-hyper"])
def test_bfloat16_critics_have_the_losses_and_gradients_of_float32(critic):
    """Losses within 2 %, gradients with a cosine of at least 0.98."""
    agent, args = make_agent(critic, primary_widths=(64, 128), dynamic_width=32)
    batch, noise = make_batch(64)
    results = {}
    for precision in ("float32", "bfloat16"):
        args.precision = precision
        losses = critic_loss(agent, batch, noise[0], args), actor_loss(agent, batch, noise[1], args)
        parameters = [*agent.critics.parameters()], [*agent.actor.parameters()]
        gradients = torch.autograd.grad(losses[0], parameters[0])
        gradients = gradients, torch.autograd.grad(losses[1][0], parameters[1])
        flat = [torch.cat([g.flatten() for g in gs]) for gs in gradients]
        assert losses[0].dtype == losses[1][0].dtype == torch.float32
        results[precision] = (losses[0].item(), *flat)
    (loss, *gradients), (loss_16, *gradients_16) = results.values()
    assert loss_16 == pytest.approx(loss, rel=0.02) and loss_16 != loss
    assert all(cosine(a, b) > 0.98 for a, b in zip(gradients, gradients_16))


RUN_DIR = Path("runs/sac_hyper/InvertedPendulum-v4/mlp-small/seed1")


def test_a_resumed_run_ends_like_one_never_interrupted_temperature_included(run_main):
    for args in ([*small(400), "--runs-dir", "whole"], small(250), small(400)):
        assert run_main(SCRIPT, *args).code == 0
    assert_same_run(RUN_DIR, Path("whole", *RUN_DIR.parts[1:]), 400)
    assert_refused(run_main(SCRIPT, *small(400), "--no-autotune"), "autotune was True and is False")
    state = torch.load(RUN_DIR / "checkpoint.pt", weights_only=True)
    assert state["alpha"]["state"][0]["step"] > 200 and state["agent"]["log_alpha"] != 0
