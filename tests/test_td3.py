"""The update of td3_hyper.py: what it computes, and where gradients go."""

import copy

import numpy as np
import pytest
import torch
from conftest import ROOT, cosine, graph_of

from hypernet import CRITICS
from td3_hyper import (
    Actor,
    Agent,
    Args,
    ReplayBuffer,
    act,
    actor_loss,
    critic_loss,
    evaluate,
    make_env,
    update,
)

SCRIPT = ROOT / "td3_hyper.py"


def make_agent(critic: str, **options) -> tuple[Agent, Args]:
    torch.manual_seed(0)
    args = Args(critic=critic, **{"primary_widths": (8, 16), "dynamic_width": 8} | options)
    return Agent(3, 2, args), args


def make_batch(size: int = 10) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    torch.manual_seed(1)
    obs, next_obs = torch.randn(2, size, 3)
    action, terminated = 2 * torch.rand(size, 2) - 1, (torch.rand(size) < 0.3).float()
    return (obs, action, torch.randn(size), next_obs, terminated), torch.randn(size, 2)


def make_optimizers(agent: Agent, lr: float = 1e-3) -> dict[str, torch.optim.Adam]:
    networks = {"critic": agent.critics, "actor": agent.actor}
    return {n: torch.optim.Adam(net.parameters(), lr, fused=True) for n, net in networks.items()}


@pytest.mark.parametrize("critic", CRITICS)
def test_actor_loss_reaches_the_actor_and_no_parameter_of_a_critic(critic):
    agent, args = make_agent(critic)
    loss = actor_loss(agent, make_batch()[0], args)
    reached, _ = graph_of(loss)
    assert reached == {id(p) for p in agent.actor.parameters()}
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.actor.parameters())
    assert all(p.grad is None for p in agent.critics.parameters())
    assert all(p.requires_grad for p in agent.critics.parameters())  # and is trained on


def test_actor_gradient_flows_only_through_the_dynamic_network():
    """Fig. 2c: the primary network costs no backward pass, however deep it is."""
    batch = make_batch()[0]
    nodes = []
    for widths in ((8,), (8, 16, 32)):
        agent, args = make_agent("sa-hyper", primary_widths=widths)
        nodes.append(graph_of(actor_loss(agent, batch, args))[1])
    assert nodes[0] == nodes[1]


@pytest.mark.parametrize("critic", ["mlp", "sa-hyper"])
def test_losses_equal_their_equations_sample_by_sample(critic):
    agent, args = make_agent(critic, gamma=0.9)
    (obs, action, reward, next_obs, terminated), noise = make_batch()
    noise = 3 * noise  # beyond noise_clip for some
    expected = 0.0
    for i in range(len(obs)):
        epsilon = np.clip(0.2 * noise[i].numpy(), -0.5, 0.5)
        next_action = act(agent.target_actor, next_obs[i].numpy(), "cpu") + epsilon
        next_action = np.clip(next_action, -1, 1)
        next_action = torch.from_numpy(next_action).float()[None]
        q1, q2 = (q(next_obs[i][None], next_action).item() for q in agent.target_critics)
        y = reward[i].item() + 0.9 * (1 - terminated[i].item()) * min(q1, q2)
        for q in agent.critics:
            expected += (q(obs[i][None], action[i][None]).item() - y) ** 2 / len(obs)
    loss = critic_loss(agent, (obs, action, reward, next_obs, terminated), noise, args)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    expected = -np.mean([agent.critics[0](o, agent.actor(o)).item() for o in obs.split(1)])
    assert actor_loss(agent, (obs,), args).item() == pytest.approx(expected, rel=1e-5)
    assert graph_of(loss)[0] == {id(p) for p in agent.critics.parameters()}


def test_targets_move_by_tau_with_the_delayed_update_alone():
    agent, args = make_agent("sa-hyper", tau=0.1)
    batch, noise = make_batch()
    before = copy.deepcopy(agent)
    losses = update(agent, make_optimizers(agent), batch, noise, args, delayed=False)
    assert set(losses) == {"critic_loss"}
    for part in ("actor", "target_actor", "target_critics"):
        for p, old in zip(getattr(agent, part).parameters(), getattr(before, part).parameters()):
            assert torch.equal(p, old)
    new, old = (a.critics[0].hyper.hidden.W.weight for a in (agent, before))
    assert not torch.equal(new, old)
    losses = update(agent, make_optimizers(agent), batch, noise, args, delayed=True)
    assert set(losses) == {"critic_loss", "actor_loss"}
    for target, online in (("target_actor", "actor"), ("target_critics", "critics")):
        triples = (getattr(agent, target), getattr(agent, online), getattr(before, target))
        for new, p, old in zip(*(module.parameters() for module in triples)):
            torch.testing.assert_close(new, 0.9 * old + 0.1 * p)
    assert not torch.equal(agent.actor.hidden1.weight, before.actor.hidden1.weight)
    assert not any(p.requires_grad or p.grad_fn for p in agent.targets)  # or memory would grow


@pytest.mark.parametrize("critic", [critic for critic in CRITICS if critic != "mlp-large"])
def test_bfloat16_critics_have_the_losses_and_gradients_of_float32(critic):
    agent, args = make_agent(critic, primary_widths=(64, 128), dynamic_width=32)
    batch, noise = make_batch(64)
    results = {}
    for precision in ("float32", "bfloat16"):
        args.precision = precision
        loss = critic_loss(agent, batch, noise, args)
        critic_gradients = torch.autograd.grad(loss, [*agent.critics.parameters()])
        actor_gradients = torch.autograd.grad(
            actor_loss(agent, batch, args), [*agent.actor.parameters()]
        )
        gradients = (*critic_gradients, *actor_gradients)
        assert loss.dtype == torch.float32 and {g.dtype for g in gradients} == {torch.float32}
        flat = [torch.cat([g.flatten() for g in gs]) for gs in (critic_gradients, actor_gradients)]
        results[precision] = (loss.item(), *flat)
    (loss, critic_gradient, actor_gradient), (loss_16, *gradients_16) = results.values()
    assert loss_16 == pytest.approx(loss, rel=0.02) and loss_16 != loss
    assert cosine(critic_gradient, gradients_16[0]) > 0.98
    assert cosine(actor_gradient, gradients_16[1]) > 0.98


def test_replay_buffer_keeps_the_newest_and_survives_its_state_dict():
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(2, 1, capacity=5, device="cpu")
    for i in range(8):
        buffer.add([i, i], [10 * i], 100.0 * i, [i + 1, i + 1], i % 2 == 0)
    assert len(buffer) == 5
    again = ReplayBuffer(2, 1, capacity=5, device="cpu")
    again.load_state_dict(buffer.state_dict())
    for b in (buffer, again):
        obs, action, reward, next_obs, terminated = b.sample(500, rng)
        assert obs.shape == next_obs.shape == (500, 2) and action.shape == (500, 1)
        assert reward.shape == terminated.shape == (500,)
        i = obs[:, 0]
        assert set(i.tolist()) == {3, 4, 5, 6, 7}
        assert (action[:, 0] == 10 * i).all() and (reward == 100 * i).all()
        assert (next_obs[:, 1] == i + 1).all() and (terminated == (i % 2 == 0)).all()
    buffer.add([8, 8], [0], 0.0, [0, 0], False)
    again.add([8, 8], [0], 0.0, [0, 0], False)
    assert torch.equal(buffer.data, again.data)


def test_evaluation_is_the_same_every_time_and_deterministic():
    args = Args(env_id="InvertedPendulum-v4", eval_episodes=3, seed=1, device="cpu")
    env, actor = make_env(args), Actor(4, 1)
    first, second = evaluate(actor, env, args), evaluate(actor, env, args)
    assert first == second and len(first) == 3 and len({r for r, _ in first}) > 1
    args.seed = 2
    assert evaluate(actor, env, args) != first
    # One episode by hand
    obs, _ = env.reset(seed=101)
    total, length, done = 0.0, 0, False
    while not done:
        action = actor(torch.tensor(obs)).detach().numpy()
        obs, reward, terminated, truncated, _ = env.step(action)
        total, length, done = total + reward, length + 1, terminated or truncated
    assert first[0] == (total, length)
