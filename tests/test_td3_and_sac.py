"""The updates of td3_hyper.py and sac_hyper.py: what they compute, and where gradients go."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import CRITICS, assert_close_in_bfloat16, graph_of
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import pearl_hyper as pearl
import sac_hyper as sac
import td3_hyper as td3
from hypernet import ConcatCritic, Float32Linear, make_critic

SCRIPTS = pytest.mark.parametrize("script", [td3, sac], ids=["td3", "sac"])


def make_agent(script, critic: str, **options) -> tuple:
    torch.manual_seed(0)
    small = {"primary_widths": (8, 16), "dynamic_width": 8, "device": "cpu"}
    args = script.Args(critic=critic, **small | options)
    return script.Agent(3, 2, args), args


def make_batch(size: int = 10) -> tuple[td3.Batch, torch.Tensor]:
    """A batch, and the noise of the target's and of the actor's action."""
    torch.manual_seed(1)
    obs, next_obs = torch.randn(2, size, 3)
    action, terminated = 2 * torch.rand(size, 2) - 1, (torch.rand(size) < 0.3).float()
    batch = td3.Batch(obs, action, torch.randn(size), next_obs, terminated)
    return batch, torch.randn(2, size, 2)


def make_optimizers(agent) -> dict[str, torch.optim.Adam]:
    networks = {"critic": agent.critics.parameters(), "actor": agent.actor.parameters()}
    networks["alpha"] = [getattr(agent, "log_alpha", torch.zeros(1))]  # TD3 has none
    return {name: torch.optim.Adam(p, 1e-3, fused=True) for name, p in networks.items()}


def both_losses(script, agent, batch, noise, args) -> tuple[torch.Tensor, torch.Tensor]:
    """The critics' loss and the actor's."""
    loss, _ = script.critic_loss(agent, batch, noise[0], args)
    if script is td3:
        return loss, td3.actor_loss(agent, batch, args)
    return loss, sac.actor_loss(agent, batch, noise[1], args)[0]


@SCRIPTS
@pytest.mark.parametrize("critic", CRITICS)
def test_each_loss_reaches_its_own_parameters_alone(script, critic):
    agent, args = make_agent(script, critic)
    critic_loss, actor_loss = both_losses(script, agent, *make_batch(), args)
    assert graph_of(critic_loss)[0] == {id(p) for p in agent.critics.parameters()}
    assert graph_of(actor_loss)[0] == {id(p) for p in agent.actor.parameters()}
    actor_loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.actor.parameters())
    assert all(p.grad is None and p.requires_grad for p in agent.critics.parameters())


@SCRIPTS
def test_actor_gradient_flows_only_through_the_dynamic_network(script):
    """Fig. 2c: the primary network costs no backward pass, however deep it is."""
    nodes = []
    for widths in ((8,), (8, 16, 32)):
        agent, args = make_agent(script, "sa-hyper", primary_widths=widths)
        nodes.append(graph_of(both_losses(script, agent, *make_batch(), args)[1])[1])
    assert nodes[0] == nodes[1]


@pytest.mark.parametrize("critic", ["mlp", "sa-hyper"])
def test_losses_of_td3_equal_their_equations_sample_by_sample(critic):
    agent, args = make_agent(td3, critic, gamma=0.9)
    batch, (noise, _) = make_batch()
    noise = 3 * noise  # beyond noise_clip for some
    torch.nn.init.constant_(agent.target_actor.output.bias, 2.0)  # near 1, to be clipped
    critic_loss = actor_loss = 0.0
    samples = zip(*(x.split(1) for x in (*batch, noise)))
    for obs, action, reward, next_obs, terminated, epsilon in samples:
        next_action = agent.target_actor(next_obs) + (0.2 * epsilon).clamp(-0.5, 0.5)
        next_q = min(q(next_obs, next_action.clamp(-1, 1)) for q in agent.target_critics)
        y = reward + 0.9 * (1 - terminated) * next_q
        critic_loss += sum((q(obs, action) - y).item() ** 2 for q in agent.critics) / 10
        actor_loss -= agent.critics[0](obs, agent.actor(obs)).item() / 10
    loss, mean_q = td3.critic_loss(agent, batch, noise, args)
    assert loss.item() == pytest.approx(critic_loss, rel=1e-4)
    expected = agent.critics[0](batch.obs, batch.action).mean().item()
    assert mean_q.item() == pytest.approx(expected) and not mean_q.requires_grad
    assert td3.actor_loss(agent, batch, args).item() == pytest.approx(actor_loss, rel=1e-5)


@pytest.mark.parametrize("critic", ["mlp", "sa-hyper"])
def test_losses_of_sac_equal_their_equations_sample_by_sample(critic):
    agent, args = make_agent(sac, critic, gamma=0.9)
    agent.log_alpha.data.fill_(-0.7)
    alpha, (batch, noise) = math.exp(-0.7), make_batch()
    critic_loss, actor_loss, log_probs = 0.0, 0.0, []
    samples = zip(*(x.split(1) for x in (*batch, *noise)))
    for obs, action, reward, next_obs, terminated, next_noise, own_noise in samples:
        a, log_prob = agent.actor.sample(next_obs, next_noise)
        next_q = min(q(next_obs, a) for q in agent.target_critics)
        y = reward + 0.9 * (1 - terminated) * (next_q - alpha * log_prob)
        critic_loss += sum((q(obs, action) - y).item() ** 2 for q in agent.critics) / 10
        a, log_prob = agent.actor.sample(obs, own_noise)
        actor_loss += (alpha * log_prob - min(q(obs, a) for q in agent.critics)).item() / 10
        log_probs.append(log_prob.item())
    loss, mean_q = sac.critic_loss(agent, batch, noise[0], args)
    assert loss.item() == pytest.approx(critic_loss, rel=1e-4)
    expected = agent.critics[0](batch.obs, batch.action).mean().item()
    assert mean_q.item() == pytest.approx(expected) and not mean_q.requires_grad
    loss, log_prob = sac.actor_loss(agent, batch, noise[1], args)
    assert loss.item() == pytest.approx(actor_loss, rel=1e-4)
    np.testing.assert_allclose(log_prob.numpy(), log_probs, rtol=1e-4, atol=1e-5)
    loss = sac.alpha_loss(agent, log_prob, 2)
    assert loss.item() == pytest.approx(-alpha * (np.mean(log_probs) - 2), rel=1e-4)
    assert graph_of(loss)[0] == {id(agent.log_alpha)}  # and not the actor


def changed(network: torch.nn.Module, before: torch.nn.Module) -> set[str]:
    """The network's children of which a parameter has changed."""
    pairs = zip(network.named_parameters(), before.parameters())
    return {name.split(".")[0] for (name, p), old in pairs if not torch.equal(p, old)}


@SCRIPTS
def test_one_update_moves_the_critics_and_the_other_actor_temperature_and_targets_by_tau(script):
    agent, args = make_agent(script, "sa-hyper", tau=0.1)
    (batch, noise), before, optimizers = make_batch(), copy.deepcopy(agent), make_optimizers(agent)
    losses = script.update_critics(agent, optimizers, batch, noise[0], args)
    assert set(losses) == {"critic_loss", "q_value"} and changed(agent, before) == {"critics"}
    critics = copy.deepcopy(agent.critics)
    if script is td3:
        losses = td3.update_actor_and_targets(agent, optimizers, batch, args)
        assert set(losses) == {"actor_loss"}
    else:
        losses = sac.update_actor_and_targets(agent, optimizers, batch, noise[1], args)
        assert set(losses) == {"actor_loss", "alpha_loss", "alpha"}
        assert agent.log_alpha != before.log_alpha
    for new, p, old in zip(agent.targets, agent.online, before.targets):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p)
        assert not (new.requires_grad or new.grad_fn)  # or memory would grow
    assert not changed(agent.critics, critics)
    assert "actor" in changed(agent, before)


@SCRIPTS
@pytest.mark.parametrize("critic", ["mlp", "d2rl", "as-hyper", "sa-hyper"])
def test_bfloat16_critics_have_the_losses_and_gradients_of_float32(script, critic):
    agent, args = make_agent(script, critic, primary_widths=(64, 128), dynamic_width=32)

    def losses(precision: str):
        args.precision = precision
        return both_losses(script, agent, *make_batch(64), args)

    assert_close_in_bfloat16(losses, [agent.critics, agent.actor])


@pytest.mark.parametrize("name", [*CRITICS, "pearl"])
@torch.no_grad()
def test_a_q_near_1000_is_not_rounded_to_multiples_of_4_in_bfloat16(name):
    torch.manual_seed(0)
    obs = torch.randn(1, 11).expand(201, -1)
    action = torch.linspace(-1, 1, 201)[:, None] * torch.randn(3)
    mlp = ConcatCritic(pearl.MLP(14, 300, 1).layers)
    critic = mlp if name == "pearl" else make_critic(name, 11, 3)
    if name == "sa-hyper":  # W of the output layer makes it so large, else b
        bias = critic.hyper.output.to_W.bias.fill_(1)
        bias.fill_(1000 / critic(obs, action).mean())
    else:
        linears = [layer for layer in critic.modules() if isinstance(layer, Float32Linear)]
        last = critic.hyper.output.to_b if name == "as-hyper" else linears[-1]
        last.weight.mul_(20)
        last.bias.fill_(1000)
    args = [td3.Args(precision=p, device="cpu") for p in ("bfloat16", "float32")]
    values, expected = (len(td3.q_value(critic, obs, action, a).unique()) for a in args)
    assert values > 0.7 * expected > 70


def actor_with(mean, log_std) -> sac.Actor:
    """An actor whose distribution is the same in every state, in float64."""
    actor = sac.Actor(3, len(mean)).double()
    actor.output.weight.data.zero_()
    actor.output.bias.data = torch.tensor([*mean, *log_std]).double()
    return actor


@pytest.mark.parametrize("reach", [1.0, 12.0], ids=["inside", "at the bounds"])
def test_log_probability_of_sac_equals_torch_distributions(reach):
    normal = Normal(torch.tensor([0.3, -0.5]).double(), torch.tensor([0.7, 1.5]).double())
    actor = actor_with(normal.mean, normal.stddev.log())
    torch.manual_seed(0)
    noise = reach * torch.randn(1000, 2).double()
    action, log_prob = actor.sample(torch.randn(1000, 3).double(), noise)
    tanh = TanhTransform(cache_size=1)  # the cache makes the inverse exact
    squashed = tanh(normal.mean + normal.stddev * noise)
    distribution = TransformedDistribution(Independent(normal, 1), [tanh])
    torch.testing.assert_close(action, squashed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_prob, distribution.log_prob(squashed), rtol=1e-10, atol=1e-10)


def test_actions_of_sac_are_tanh_of_the_mean_plus_noise_of_a_bounded_std():
    actor = actor_with([0.4, -1.2], [0, 0]).float()
    obs, noise = np.float32([0, 0, 0]), np.float32([0.5, -1])
    np.testing.assert_allclose(sac.act(actor, obs, "cpu"), np.tanh([0.4, -1.2]), rtol=1e-5)
    assert sac.explore(actor, obs, noise, "cpu") == pytest.approx(np.tanh([0.9, -2.2]), rel=1e-5)
    _, log_std = actor_with([0, 0], [5, -50]).mean_and_log_std(torch.zeros(4, 3).double())
    assert (log_std == torch.tensor([2, -20])).all()


@pytest.mark.parametrize("alpha", [0.2, 0.0])
def test_without_autotune_the_temperature_stays(alpha):
    agent, args = make_agent(sac, "mlp", autotune=False, alpha=alpha)
    batch, (_, noise) = make_batch()
    losses = sac.update_actor_and_targets(agent, make_optimizers(agent), batch, noise, args)
    assert set(losses) == {"actor_loss"}
    assert all(loss.isfinite() for loss in losses.values())
    assert agent.log_alpha.exp().item() == pytest.approx(alpha)


def test_replay_buffer_keeps_the_newest_and_survives_its_state_dict():
    rng = np.random.default_rng(0)
    buffer = td3.ReplayBuffer(2, 1, capacity=5, device="cpu")
    for i in range(8):
        buffer.add([i, i], [10 * i], 100.0 * i, [i + 1, i + 1], i % 2 == 0)
    again = td3.ReplayBuffer(2, 1, capacity=5, device="cpu")
    again.load_state_dict(buffer.state_dict())
    for b in (buffer, again):
        sample = b.sample(500, rng)
        i, pair = sample[0][:, :1], torch.ones(2)
        assert set(i.flatten().tolist()) == {3, 4, 5, 6, 7}
        expected = i * pair, 10 * i, 100 * i[:, 0], (i + 1) * pair, (i[:, 0] % 2 == 0).float()
        torch.testing.assert_close(sample, expected)
        b.add([8, 8], [0], 0.0, [0, 0], False)
    assert torch.equal(buffer.data, again.data)


@SCRIPTS
def test_random_steps_are_those_of_td3s_paper_unless_given(script):
    expected = {"HalfCheetah-v4": 10_000, "Ant-v5": 10_000, "Hopper-v4": 1_000}
    expected |= {"Antenna-v0": 1_000, "Ant-Maze-v0": 1_000, "my/Ant-v0": 1_000}
    for env, steps in expected.items():
        assert script.Args(env_id=env, device="cpu").learning_starts == steps
        assert script.Args(env_id=env, device="cpu", learning_starts=0).learning_starts == 0


def test_evaluation_is_the_same_every_time_and_deterministic():
    args = td3.Args(env_id="InvertedPendulum-v4", eval_episodes=3, seed=1, device="cpu")
    torch.manual_seed(5)
    env, actor = td3.make_env(args), td3.Actor(4, 1)
    first, second = td3.evaluate(actor, env, args), td3.evaluate(actor, env, args)
    assert first == second and len(first) == 3 and len({r for r, _ in first}) > 1
    args.seed = 2
    assert td3.evaluate(actor, env, args) != first
    # One episode by hand
    obs, _ = env.reset(seed=101)
    total, length, done = 0.0, 0, False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(td3.act(actor, obs, "cpu"))
        total, length, done = total + reward, length + 1, terminated or truncated
    assert first[0] == (total, length)
