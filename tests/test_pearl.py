"""PEARL: the posterior, where gradients go, what is collected and scored; the run; learning."""

import copy
import csv
import json
import math
import re
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, start
from test_run import assert_equal, assert_refused, can_render, damage, files
from test_shared import top_level
from test_td3 import graph_of
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import meta_envs
import pearl_hyper
from meta_envs import FAMILIES, Family
from pearl_hyper import (
    FAMILY_ARGS,
    Agent,
    Args,
    Batch,
    ReplayBuffer,
    collect,
    evaluate,
    infer,
    kl_from_prior,
    log_prob,
    make_optimizers,
    product_of_gaussians,
    q_loss,
    rollout,
    sample_batch,
    update,
    v_and_policy_loss,
)

SCRIPT = ROOT / "pearl_hyper.py"
OBS, ACTION, T, N, M = 4, 2, 3, 5, 7
MODELS = pytest.mark.parametrize("model", ["mlp", "hyper"])
CONTEXTS = pytest.mark.parametrize("context", ["learned", "oracle"])


class PointMass:
    """x moves by 0.2 a along a line, the reward is -(x - goal)²; it may fall off at `edge`.

    It stands for `MetaVectorEnv` and keeps what happens: `log` has the mask of every reset.
    """

    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    single_action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, env_id, goals, episodes_per_goal, num_threads=1, horizon=20, edge=math.inf):
        self.goals, self.episodes_per_goal = np.asarray(goals, dtype=float), episodes_per_goal
        self.horizon, self.edge = horizon, edge
        n = len(goals) * episodes_per_goal
        self.x, self.elapsed = np.zeros((n, 1)), np.full(n, horizon)
        self.returns, self.log, self.starts, self.actions = np.zeros(n), [], [], []

    def set_goals(self, goals):
        assert len(goals) == len(self.goals)
        self.goals = goals

    def reset(self, *, seed, options):
        mask = options["reset_mask"]
        self.x[mask] = np.random.default_rng(seed).uniform(-0.1, 0.1, (mask.sum(), 1))
        self.elapsed[mask], self.returns[mask] = 0, 0.0
        self.log.append(mask)
        self.starts.append(self.x.copy())
        return self.x.copy(), {}

    def step(self, actions):
        assert abs(actions).max() <= 1
        live = (self.elapsed < self.horizon) & (abs(self.x[:, 0]) < self.edge)
        self.x[live] += 0.2 * actions[live]
        self.elapsed += live
        distance = self.x[:, 0] - np.repeat(self.goals, self.episodes_per_goal)
        reward = live * -(distance**2)
        self.returns += reward
        self.actions.append(actions)
        terminated = abs(self.x[:, 0]) >= self.edge
        return self.x.copy(), reward, terminated, self.elapsed >= self.horizon, {}

    def close(self):
        pass


def make_args(**options) -> Args:
    small = dict(device="cpu", primary_widths=(8, 16), dynamic_width=8, horizon=20)
    small |= dict(num_train_goals=T, meta_batch_size=T, batch_size=N, context_batch_size=M)
    return Args(**(small | dict(critic_lr=1e-3, policy_lr=1e-3) | options))


def make_agent(obs_dim: int = OBS, action_dim: int = ACTION, **options) -> tuple[Agent, Args]:
    torch.manual_seed(0)
    args = make_args(**options)
    agent = Agent(obs_dim, action_dim, args)
    for module in agent.modules():  # last layers that start at nearly nothing hide mistakes
        if isinstance(module, torch.nn.Linear) and module.weight.std() < 0.01:
            torch.nn.init.normal_(module.weight, std=0.1)
    return agent, args


def make_batch(args: Args) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    obs, next_obs = torch.randn(2, T, N, OBS)
    action = torch.rand(T, N, ACTION) * 2 - 1
    terminated = (torch.rand(T, N) < 0.3).float()
    context = torch.randn(T, 1) if args.context == "oracle" else torch.randn(T, M, OBS + ACTION + 1)
    batch = Batch(obs, action, torch.randn(T, N), next_obs, terminated, context)
    return batch, torch.randn(T, args.latent_dim), torch.randn(T, N, ACTION)


def parameters(*modules) -> set[int]:
    return {id(p) for module in modules for p in module.parameters()}


def inputs_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """What the module is called with from now on."""
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    return seen


# The posterior


def test_product_of_gaussians_equals_the_closed_form():
    torch.manual_seed(0)
    mean, variance = torch.randn(T, N, 5).double(), torch.rand(T, N, 5).double() + 0.1
    # Two Gaussians after another: N(a, A) N(b, B) ~ N((a B + b A) / (A + B), A B / (A + B))
    m, v = mean[:, 0], variance[:, 0]
    for n in range(1, N):
        b, B = mean[:, n], variance[:, n]
        m, v = (m * B + b * v) / (v + B), v * B / (v + B)
    result = product_of_gaussians(mean, variance)
    torch.testing.assert_close(result, (m, v))
    order = torch.randperm(N)
    torch.testing.assert_close(product_of_gaussians(mean[:, order], variance[:, order]), (m, v))


def test_product_of_gaussians_is_the_density_of_the_product():
    mean, variance = torch.tensor([[[0.3], [-1.0]]]), torch.tensor([[[0.5], [2.0]]])
    x = torch.linspace(-12, 12, 100_001).double()
    density = Normal(0.3, 0.5**0.5).log_prob(x).exp() * Normal(-1.0, 2.0**0.5).log_prob(x).exp()
    density /= torch.trapezoid(density, x)
    m, v = (y.item() for y in product_of_gaussians(mean, variance))
    torch.testing.assert_close(density, Normal(m, v**0.5).log_prob(x).exp(), atol=1e-6, rtol=0)


def test_kl_equals_torch_distributions():
    torch.manual_seed(0)
    mean, variance = torch.randn(T, 5), torch.rand(T, 5) + 0.1
    expected = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(kl_from_prior(mean, variance), expected)
    assert kl_from_prior(torch.zeros(T, 5), torch.ones(T, 5)) == 0


def test_more_context_makes_the_posterior_narrower():
    agent, _ = make_agent()
    context = torch.randn(1, 50, OBS + ACTION + 1)
    few, many = (agent.encoder(context[:, :n])[1] for n in (5, 50))
    assert (many < few).all()


@pytest.mark.parametrize("reach", [1.0, 12.0], ids=["inside", "at the bounds"])
def test_log_probability_equals_torch_distributions(reach):
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(3, T, N, ACTION).double()
    noise = reach * noise
    u = mean + log_std.exp() * noise
    transform = TanhTransform(cache_size=1)  # the cache makes the inverse exact
    squashed = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), transform)
    torch.testing.assert_close(log_prob(u, noise, log_std), squashed.log_prob(transform(u)))


# Networks and gradients


def test_mlps_have_the_released_layers_and_start():
    agent = Agent(OBS, ACTION, make_args(model="mlp"))
    for net, widths, output in (
        (agent.q[1].net, (OBS + ACTION + 5, 300, 300, 300, 1), 3e-3),
        (agent.v.net, (OBS + 5, 300, 300, 300, 1), 3e-3),
        (agent.policy.net, (OBS + 5, 300, 300, 300, 2 * ACTION), 1e-3),
        (agent.encoder.net, (OBS + ACTION + 1, 200, 200, 200, 2 * 5), 3e-3),
    ):
        linears = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
        assert [x.weight.shape for x in linears] == [*zip(widths[1:], widths)]
        bounds = [width**-0.5 for width in widths[1:-1]] + [output]
        for linear, bound in zip(linears, bounds):
            assert 0.95 * bound < linear.weight.abs().max() <= bound
        assert all((linear.bias == 0.1).all() for linear in linears[:-1])


@MODELS
def test_the_policys_log_std_is_bounded(model):
    agent, args = make_agent(model=model)
    task = agent.policy.generate(torch.randn(T, args.latent_dim))
    _, log_std = agent.policy.dynamic(task, 1e6 * torch.randn(T, N, OBS))
    assert log_std.min() == -20 and log_std.max() == 2


def test_the_encoders_variance_is_a_softplus_and_never_zero():
    agent, _ = make_agent()
    context = torch.randn(T, 1, OBS + ACTION + 1)  # a product of one factor
    mean, x = agent.encoder.net(context).squeeze(1).chunk(2, -1)
    torch.testing.assert_close(agent.encoder(context), (mean, (1 + x.exp()).log()))
    agent.encoder.net[-1].bias.data -= 200
    assert (agent.encoder(context)[1] > 0).all()


@MODELS
def test_encoder_learns_from_the_q_loss_and_the_kl_alone(model):
    agent, args = make_agent(model=model)
    batch, z_noise, noise = make_batch(args)
    z, kl = infer(agent, batch.context, z_noise)
    assert graph_of(q_loss(agent, batch, z, args))[0] == parameters(agent.q, agent.encoder)
    assert graph_of(kl)[0] == parameters(agent.encoder)
    v_loss, policy_loss = v_and_policy_loss(agent, batch, z, noise, args)
    assert graph_of(v_loss)[0] == parameters(agent.v)
    assert graph_of(policy_loss)[0] == parameters(agent.policy)
    assert all(p.requires_grad for p in agent.q.parameters())


def test_the_gradient_of_the_encoder_in_an_update_is_that_of_q_loss_and_weighted_kl():
    agent, args = make_agent(kl_weight=0.3)
    batch, z_noise, noise = make_batch(args)
    z, kl = infer(agent, batch.context, z_noise)
    loss = q_loss(agent, batch, z, args) + 0.3 * kl
    expected = torch.autograd.grad(loss, [*agent.encoder.parameters()])
    update(agent, make_optimizers(agent, args), batch, z_noise, noise, args)
    torch.testing.assert_close([p.grad for p in agent.encoder.parameters()], [*expected])


def test_policy_weights_are_generated_once_a_task():
    agent, args = make_agent()
    batch, z_noise, noise = make_batch(args)
    seen = inputs_of(agent.policy.net.primary)
    update(agent, make_optimizers(agent, args), batch, z_noise, noise, args)
    assert [x.shape for x in seen] == [(T, args.latent_dim)]  # not T * N rows

    agent, args = make_agent(1, 1)
    seen = inputs_of(agent.policy.net.primary)
    envs = PointMass("", [0.0, 1.0], 2)
    rollout(agent.policy, torch.randn(4, 5), envs, np.ones(4, bool), np.random.default_rng(0))
    assert [x.shape for x in seen] == [(4, 5)]  # once for a whole trajectory


def test_the_state_is_the_meta_variable_of_the_critics_and_z_a_base_variable():
    agent, args = make_agent()
    batch, z_noise, _ = make_batch(args)
    z = infer(agent, batch.context, z_noise)[0].unsqueeze(1).expand(-1, N, -1)
    for critic, base in ((agent.q[0], (batch.action, z)), (agent.v, (z,))):
        seen = inputs_of(critic.net.primary)
        first = critic(batch.obs, *base)
        torch.testing.assert_close(seen[0], batch.obs)
        assert critic.net.hidden.shape[0] == sum(x.shape[-1] for x in base)
        other = critic(batch.obs, *base[:-1], z + 1)
        assert first.shape == (T, N) and not torch.allclose(first, other)


def test_policy_gradient_flows_only_through_the_dynamic_network_of_q():
    nodes = []
    for widths in ((8,), (8, 16, 32)):
        agent, args = make_agent(primary_widths=widths)
        agent.policy = make_agent()[0].policy
        batch, z_noise, noise = make_batch(args)
        nodes.append(graph_of(v_and_policy_loss(agent, batch, z_noise, noise, args)[1])[1])
    assert nodes[0] == nodes[1]


@MODELS
@CONTEXTS
def test_losses_equal_their_equations_sample_by_sample(model, context):
    agent, args = make_agent(model=model, context=context, gamma=0.9, policy_reg=0.01)
    batch, z_noise, noise = make_batch(args)
    z, _ = infer(agent, batch.context, z_noise)
    squares = {"q": [], "v": []}
    y, means, log_stds = [], [], []
    for t in range(T):
        task = agent.policy.generate(z[t : t + 1])
        for n in range(N):
            one = (slice(t, t + 1), slice(n, n + 1))
            obs, action, next_obs, zt = (
                batch.obs[one],
                batch.action[one],
                batch.next_obs[one],
                z[one[0]],
            )
            target = agent.target_v(next_obs, zt[None])
            target = 5 * batch.reward[one] + 0.9 * (1 - batch.terminated[one]) * target
            squares["q"] += [sum((q(obs, action, zt[None]) - target) ** 2 for q in agent.q)]
            mean, log_std = agent.policy.dynamic(task, obs)
            u = mean + log_std.exp() * noise[one]
            q = min(q(obs, u.tanh(), zt[None]).item() for q in agent.q)
            normal = Normal(mean, log_std.exp())
            correction = (1 - u.tanh().square()).log().sum().item()
            y.append(q - normal.log_prob(u).sum().item() + correction)
            squares["v"] += [(agent.v(obs, zt[None]) - y[-1]) ** 2]
            means.append(mean)
            log_stds.append(log_std)
    expected = {name: torch.cat(values).mean().item() for name, values in squares.items()}
    assert q_loss(agent, batch, z, args).item() == pytest.approx(expected["q"], rel=1e-4)
    v_loss, policy_loss = v_and_policy_loss(agent, batch, z, noise, args)
    assert v_loss.item() == pytest.approx(expected["v"], rel=1e-4)
    regularisation = sum(torch.cat(x).square().mean().item() for x in (means, log_stds))
    assert policy_loss.item() == pytest.approx(0.01 * regularisation - np.mean(y), rel=1e-3)


@MODELS
@CONTEXTS
def test_one_update_moves_everything_and_the_target_by_tau(model, context):
    agent, args = make_agent(model=model, context=context, tau=0.1)
    batch, z_noise, noise = make_batch(args)
    before = copy.deepcopy(agent)
    losses = update(agent, make_optimizers(agent, args), batch, z_noise, noise, args)
    assert set(losses) == {"kl", "q_loss", "v_loss", "policy_loss"}
    assert not any(loss.requires_grad for loss in losses.values())
    for new, p, old in zip(agent.target, agent.online, before.target):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * p)
        assert not new.requires_grad
    parts = ["q", "v", "policy"] + ["encoder"] * (context == "learned")
    for name in parts:
        old, new = (next(getattr(a, name).parameters()) for a in (before, agent))
        assert not torch.equal(old, new), name


@MODELS
def test_the_plain_update_that_speed_is_measured_against_is_the_same_update(model, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "analysis")
    from speed_pearl import plain_update

    agent, args = make_agent(model=model)
    twin = copy.deepcopy(agent)
    inputs = (*make_batch(args), args)
    update(agent, make_optimizers(agent, args), *inputs)
    plain_update(twin, make_optimizers(twin, args), *inputs)
    for p, q in zip(agent.parameters(), twin.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(agent.target, twin.target)


def test_the_oracle_is_the_goal_with_no_encoder_and_no_kl():
    agent, args = make_agent(context="oracle")
    batch, z_noise, _ = make_batch(args)
    z, kl = infer(agent, batch.context, z_noise)
    assert agent.encoder is None and kl == 0 and torch.equal(z, batch.context)
    assert set(make_optimizers(agent, args)) == {"q_optimizer", "v_optimizer", "policy_optimizer"}
    goals, rng = np.array([-1.0, 0.5, 2.0]), np.random.default_rng(0)
    buffer, encoder_buffer = make_buffers(1, 1)
    envs = PointMass("", goals, 2)
    point_agent, args = make_agent(1, 1, context="oracle")
    for posterior in (False, True):
        collect(
            point_agent, envs, np.arange(3), 40, posterior, buffer, encoder_buffer, goals, rng, args
        )
    assert encoder_buffer.added == [0, 0, 0]
    batch = sample_batch(buffer, encoder_buffer, goals, rng, args)
    assert batch.context.shape == (T, 1) and set(batch.context.flatten().tolist()) <= {*goals}
    reward = -(batch.next_obs.squeeze(-1) - batch.context).square()
    torch.testing.assert_close(batch.reward, reward, atol=1e-5, rtol=0)  # of the task of the goal


# Data


def make_buffers(
    obs_dim: int, action_dim: int, tasks: int = T
) -> tuple[ReplayBuffer, ReplayBuffer]:
    widths = (obs_dim, action_dim, 1, obs_dim, 1), (obs_dim + action_dim + 1,)
    return tuple(ReplayBuffer(tasks, w, 1_000_000, "cpu") for w in widths)


def test_buffer_samples_the_tasks_asked_for_and_keeps_the_last_transitions():
    buffer = ReplayBuffer(2, (1, 2), capacity=10, device="cpu")
    for i in range(0, 14, 2):
        buffer.add(1, torch.arange(i, i + 2).float()[:, None].expand(-1, 3))
        buffer.add(0, torch.full((1, 3), -1.0))
    assert sorted(buffer.data[1][:, 0].tolist()) == [*range(4, 14)]
    a, b = buffer.sample(np.array([1, 0, 1]), 200, np.random.default_rng(0))
    assert a.shape == (3, 200, 1) and b.shape == (3, 200, 2) and (a == b).all()
    assert (a[1] == -1).all() and set(a[0].flatten().tolist()) == {*range(4, 14)}
    buffer.clear(0)
    buffer.add(0, torch.full((1, 3), -2.0))
    assert (buffer.sample(np.array([0]), 50, np.random.default_rng(0))[0] == -2).all()
    buffer.add(1, torch.arange(50).float()[:, None].expand(-1, 3))  # more than it holds
    assert sorted(buffer.data[1][:, 0].tolist()) == [*range(40, 50)]


def test_buffers_memory_grows_with_what_is_in_them():
    buffer = ReplayBuffer(100, (48,), capacity=1_000_000, device="cpu")
    assert sum(data.numel() for data in buffer.data) == 0
    for _ in range(100):
        buffer.add(3, torch.zeros(200, 48))
    assert 20_000 <= len(buffer.data[3]) <= 40_000
    state = buffer.state_dict()
    assert [len(data) for data in state["data"]] == [20_000 * (i == 3) for i in range(100)]


def test_a_loaded_buffer_goes_on_as_the_one_that_was_saved():
    first = ReplayBuffer(2, (3,), capacity=25, device="cpu")
    for length in (7, 4, 9, 8, 3):
        second = ReplayBuffer(2, (3,), capacity=25, device="cpu")
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for task, rows in enumerate(torch.randn(2, length, 3)):
            first.add(task, rows)
            second.add(task, rows)
        tasks = np.array([0, 1, 1])
        a, b = (x.sample(tasks, 50, np.random.default_rng(1))[0] for x in (first, second))
        assert torch.equal(a, b)


def test_encoder_buffer_holds_only_prior_data_of_the_latest_collection():
    agent, args = make_agent(1, 1)
    goals, rng = np.array([-1.0, 0.5, 2.0]), np.random.default_rng(0)
    buffer, encoder_buffer = make_buffers(1, 1)
    data = (buffer, encoder_buffer, goals, rng, args)
    envs = PointMass("", goals, 3)
    tasks = np.array([2, 0, 2])  # of a task drawn twice, that of both draws
    for _ in range(2):
        before = list(buffer.added)
        for task in tasks:
            encoder_buffer.clear(task)
        assert collect(agent, envs, tasks, 40, False, *data) == 120
        prior = [rows[i:j] for rows, i, j in zip(buffer.data, before, buffer.added)]
        assert collect(agent, envs, tasks, 60, True, *data) == 180
    assert buffer.added == [200, 0, 400] and encoder_buffer.added == [40, 0, 80]
    for task in tasks:
        added = encoder_buffer.added[task]
        torch.testing.assert_close(encoder_buffer.data[task][:added], prior[task][:, :3])
        obs, action, reward, next_obs, terminated = buffer.data[task][: buffer.added[task]].T
        torch.testing.assert_close(next_obs, obs + 0.2 * action, atol=1e-5, rtol=0)
        torch.testing.assert_close(reward, -(next_obs - goals[task]).square().float())
        assert not terminated.any()  # time ran out: not the end


def test_posterior_is_recomputed_for_each_trajectory_and_the_prior_needs_none():
    agent, args = make_agent(1, 1)
    goals, rng = np.array([-1.0, 0.5, 2.0]), np.random.default_rng(0)
    data = (*make_buffers(1, 1), goals, rng, args)
    envs = PointMass("", goals, 3)
    contexts, latents = inputs_of(agent.encoder), inputs_of(agent.policy.net.primary)
    collect(agent, envs, np.arange(3), 40, False, *data)
    assert contexts == []
    collect(agent, envs, np.arange(3), 60, True, *data)
    (context,) = contexts
    assert context.shape == (9, M, 3)  # of 3 trajectories of each of 3 tasks
    assert len({tuple(c.flatten().tolist()) for c in context}) == 9
    mean, variance = agent.encoder(context)
    z = (latents[-1] - mean) / variance.sqrt()
    assert z.abs().max() < 5 and z.std() > 0.5  # a sample of the posterior
    for latent in latents:
        assert len({tuple(z.tolist()) for z in latent}) == 9
    batch = sample_batch(*data)
    assert batch.context.shape == (T, M, 3) and batch.obs.shape == (T, N, 1)


def test_trajectories_that_end_early_are_whole_and_others_follow_until_the_steps_are_there():
    agent, args = make_agent(1, 1)
    goals, rng = np.array([-1.0, 0.5, 2.0]), np.random.default_rng(0)
    buffer, encoder_buffer = make_buffers(1, 1)
    envs = PointMass("", goals, 2, edge=0.5)
    steps = collect(agent, envs, np.arange(3), 40, False, buffer, encoder_buffer, goals, rng, args)
    assert steps == sum(buffer.added) and len(envs.log) > 1
    for task in range(3):
        assert 40 <= buffer.added[task] < 60
        obs, _, _, next_obs, terminated = buffer.data[task][: buffer.added[task]].T
        assert terminated.any() and (obs.abs() < 0.5).all()
        assert ((next_obs.abs() >= 0.5) == terminated.bool()).all()
        starts = obs[1:] != next_obs[:-1]
        assert (terminated[:-1].bool() <= starts).all()


def test_an_action_has_noise_of_its_own_and_the_policys_std(monkeypatch):
    agent, _ = make_agent(1, 1)
    monkeypatch.setattr(
        type(agent.policy),
        "dynamic",
        lambda self, task, obs: (0 * obs, torch.full_like(obs, math.log(0.5))),
    )
    envs = PointMass("", [0.5], 10)
    rollout(agent.policy, torch.zeros(10, 5), envs, np.ones(10, bool), np.random.default_rng(0))
    noise = np.arctanh(envs.actions)  # (H, T, 1)
    assert len(np.unique(noise)) == 20 * 10 and noise.std() == pytest.approx(0.5, rel=0.2)


def test_goals_of_training_and_test_are_disjoint_draws_from_the_seed(run_main):
    drawn = []
    for seed in (1, 1, 2):
        assert run_main(SCRIPT, *small(1), "--seed", seed, "--overwrite").code == 0
        rows = read(Path(f"runs/pearl_hyper/HalfCheetahVel-v0/hyper/seed{seed}"))
        goals = {s: {r["goal"] for r in rows if r["split"] == s} for s in ("train", "test")}
        assert len(goals["train"]) == len(goals["test"]) == 2
        assert not goals["train"] & goals["test"]
        drawn.append(goals)
    assert drawn[0] == drawn[1]
    assert not (drawn[0]["train"] | drawn[0]["test"]) & (drawn[2]["train"] | drawn[2]["test"])


# Evaluation


@MODELS
@pytest.mark.parametrize("edge", [math.inf, 0.15], ids=["whole", "end early"])
def test_evaluation_scores_only_the_trajectory_after_adaptation(model, edge):
    agent, args = make_agent(1, 1, model=model)
    goals = [-1.0, 0.5, 2.0]
    returns, lengths, contexts = [], [], inputs_of(agent.encoder)
    envs = PointMass("", goals, 2, edge=edge)
    reset = envs.reset

    def recording_reset(**options):
        returns.append(envs.returns.copy())
        lengths.append(envs.elapsed.copy())
        return reset(**options)

    envs.reset = recording_reset
    result, z = evaluate(agent, envs, args)
    assert len(envs.log) == 3 and all(mask.all() for mask in envs.log)
    first, second, third = (r.reshape(3, 2).mean(1) for r in (*returns[1:], envs.returns))
    np.testing.assert_allclose(result["post"], third, rtol=1e-5)
    np.testing.assert_allclose(result["pre"], (first + second) / 2, rtol=1e-5)
    # The context of a scored trajectory is all of its own two others, and no more.
    assert [c.shape for c in contexts] == [(1, length, 3) for length in lengths[1] + lengths[2]]
    assert all((context[..., 0].abs() < edge).all() for context in contexts)
    assert z.shape == (6, 5)


def test_evaluation_is_deterministic_and_reseeded(monkeypatch):
    agent, args = make_agent(1, 1)
    calls = []

    def recording_rollout(policy, z, *rest, **options):
        calls.append((z, options))
        return rollout(policy, z, *rest, **options)

    monkeypatch.setattr(pearl_hyper, "rollout", recording_rollout)
    results = [evaluate(agent, PointMass("", [0.5, 2.0], 2), args) for _ in range(2)]
    assert_equal(*({k: v.tolist() for k, v in returns.items()} for returns, _ in results))
    assert all(options == {"deterministic": True} for _, options in calls)
    actions = []
    for log_std in (-3.0, 2.0):
        monkeypatch.setattr(
            type(agent.policy),
            "dynamic",
            lambda self, task, obs, s=log_std: (obs * 0.5, torch.full_like(obs, s)),
        )
        envs = PointMass("", [0.5], 1)
        rollout(
            agent.policy, torch.zeros(1, 5), envs, np.ones(1, bool), np.random.default_rng(0), True
        )
        actions.append(np.concatenate(envs.actions))
    np.testing.assert_array_equal(*actions)


def test_policies_that_fall_at_different_times_are_evaluated_on_the_same_starts():
    mlp, hyper = (PointMass("", [0.5, 2.0], 2, edge=0.3) for _ in range(2))
    for model, envs in (("mlp", mlp), ("hyper", hyper)):
        agent, args = make_agent(1, 1, model=model)
        evaluate(agent, envs, args)
    assert len(mlp.actions) != len(hyper.actions)
    np.testing.assert_array_equal(mlp.starts, hyper.starts)


def test_the_oracle_has_nothing_to_adapt():
    agent, args = make_agent(1, 1, context="oracle")
    envs = PointMass("", [0.5, 2.0], 2)
    returns, z = evaluate(agent, envs, args)
    assert list(returns) == ["post"] and len(envs.log) == 1
    assert z.flatten().tolist() == [0.5, 0.5, 2.0, 2.0]


# The run

SMALL = ["--env-id", "HalfCheetahVel-v0", "--primary-widths", 8, 16, "--dynamic-width", 8]
SMALL += ["--num-train-goals", 3, "--num-test-goals", 2, "--num-initial-steps", 40]
SMALL += ["--num-collect-goals", 2, "--num-prior-steps", 20, "--num-posterior-steps", 30]
SMALL += ["--num-train-steps", 3, "--meta-batch-size", 2, "--batch-size", 8]
SMALL += ["--context-batch-size", 6, "--horizon", 20]
RUN_DIR = Path("runs/pearl_hyper/HalfCheetahVel-v0/hyper/seed1")


def small(num_iterations: int) -> list:
    return SMALL + ["--num-iterations", num_iterations]


def read(run_dir: Path) -> list[dict]:
    with open(run_dir / "eval.csv") as stream:
        return list(csv.DictReader(stream))


def assert_same_run(run_dir: Path, reference: Path) -> None:
    for name in ("eval.csv", "summary.json"):
        assert (run_dir / name).read_bytes() == (reference / name).read_bytes()
    # Networks, optimizers, buffers and the generator.
    states = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (run_dir, reference))
    assert_equal(*states)


def test_a_run_killed_again_and_again_ends_like_one_never_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    process = start(SCRIPT, *small(12), cwd=whole)
    _, err = process.communicate()
    assert process.returncode == 0, err
    for moment in ("half", "2", None, "3", None):
        if moment:  # while a checkpoint is written
            script = ROOT / "tests" / "kill_in_checkpoint.py"
            process = start(script, moment, SCRIPT, *small(12), cwd=killed)
        else:
            process = start(SCRIPT, *small(12), cwd=killed)
            process.stdout.readline()  # it has begun
            time.sleep(0.3)
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(SCRIPT, *small(12), cwd=killed)
    out, err = process.communicate()
    assert process.returncode == 0 and "resuming" in out, err
    assert_same_run(killed / RUN_DIR, whole / RUN_DIR)


@MODELS
@CONTEXTS
def test_run_directory_holds_what_it_should(run_main, model, context):
    args = [*small(3), "--model", model, "--context", context, "--eval-every", 2]
    args += ["--critic-lr", 1e-3, "--policy-lr", 2e-3, "--encoder-lr", 3e-3]
    assert run_main(SCRIPT, *args).code == 0
    folder = model if context == "learned" else f"{model}-oracle"
    run_dir = Path("runs/pearl_hyper/HalfCheetahVel-v0", folder, "seed1")
    names = {file.name for file in run_dir.iterdir() if "tfevents" not in file.name}
    expected = {".lock", "checkpoint.pt", "checkpoint.prev.pt", "config.json", "eval.csv"}
    assert names == expected | {"step_3.pt", "summary.json"}
    rows = read(run_dir)
    assert list(rows[0]) == ["iteration", "env_steps", "split", "goal", "phase", "return"]
    phases = ["pre", "post"] if context == "learned" else ["post"]
    kinds = [(row["iteration"], row["phase"], row["split"]) for row in rows]
    assert kinds == [
        (iteration, phase, split)
        for iteration in ("0", "2", "3")
        for phase in phases
        for split in ("train", "train", "test", "test")
    ]
    # 3 tasks of 40 steps once; then 2 tasks of 20 and 30 steps, the latter in trajectories of 20
    assert [int(row["env_steps"]) for row in rows[:: 4 * len(phases)]] == [0, 360, 480]
    summary = json.loads((run_dir / "summary.json").read_text())
    last = [float(r["return"]) for r in rows[-4:] if r["split"] == "test" and r["phase"] == "post"]
    assert summary["test_post"] == pytest.approx(np.mean(last)) and summary["iteration"] == 3
    new, old = (torch.load(run_dir / f"checkpoint{x}.pt", weights_only=True) for x in ("", ".prev"))
    rates = {"q": 1e-3, "v": 1e-3, "policy": 2e-3, "encoder": 3e-3}
    for name in list(rates)[: 4 if context == "learned" else 3]:
        optimizer = new[f"{name}_optimizer"]
        assert optimizer["param_groups"][0]["lr"] == rates[name]
        assert {state["step"].item() for state in optimizer["state"].values()} == {3 * 3}
    # The encoder's buffer holds the 20 steps of each of a task's last draws, or nothing at all.
    draws = np.subtract(new["buffer"]["added"], old["buffer"]["added"]) // (20 + 40)
    added = np.where(draws, 20 * draws, old["encoder_buffer"]["added"]) * (context == "learned")
    assert draws.sum() == 2 and new["encoder_buffer"]["added"] == added.tolist()


def test_a_larger_number_of_iterations_extends_a_run_and_a_damaged_checkpoint_falls_back(run_main):
    assert run_main(SCRIPT, *small(4), "--runs-dir", "whole").code == 0
    assert run_main(SCRIPT, *small(2)).code == 0
    before = files(RUN_DIR)
    finished = run_main(SCRIPT, *small(2))
    assert finished.code == 0 and "complete" in finished.out and files(RUN_DIR) == before
    assert_refused(run_main(SCRIPT, *small(2), "--kl-weight", 1), "kl_weight was 0.1 and is 1.0")
    damage(RUN_DIR / "checkpoint.pt", "truncated")
    finished = run_main(SCRIPT, *small(4))
    assert finished.code == 0 and "checkpoint.pt is damaged" in finished.err
    assert_same_run(RUN_DIR, Path("whole", *RUN_DIR.parts[1:]))


def test_how_often_it_saves_changes_no_result(run_main):
    assert run_main(SCRIPT, *small(3)).code == 0
    options = ["--checkpoint-every", 2, "--save-every", 1, "--runs-dir", "other"]
    assert run_main(SCRIPT, *small(3), *options).code == 0
    assert_same_run(RUN_DIR, Path("other", *RUN_DIR.parts[1:]))
    assert len(list(Path("other").rglob("step_*.pt"))) == 4


def test_capture_video_writes_an_mp4_of_each_evaluation_and_changes_no_result(tmp_path):
    if not can_render():
        pytest.skip("no OpenGL here: apt-get install libegl1 libgl1-mesa-dri")
    for extra, folder in (([], "plain"), (["--capture-video"], "filmed")):
        (tmp_path / folder).mkdir()
        process = start(SCRIPT, *small(1), *extra, cwd=tmp_path / folder)
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert_same_run(tmp_path / "filmed" / RUN_DIR, tmp_path / "plain" / RUN_DIR)
    videos = sorted((tmp_path / "filmed" / RUN_DIR / "videos").glob("*.mp4"))
    names = [f"iteration_{i}-episode-0.mp4" for i in (0, 1)]
    assert [video.name for video in videos] == names


@pytest.mark.parametrize("env_id", FAMILIES)
def test_a_flag_goes_before_the_familys_default_and_goals_are_of_their_split(env_id, run_main):
    flags = {name: 2 for name in FAMILY_ARGS[:4]} | {"num_train_steps": 1, "eval_episodes": 1}
    flags |= {"num_prior_steps": 10, "horizon": 10, "num_initial_steps": 10, "batch_size": 4}
    given = [x for name, value in flags.items() for x in (f"--{name.replace('_', '-')}", value)]
    options = ["--model", "mlp", "--num-collect-goals", 1, "--num-iterations", 1]
    options += ["--num-posterior-steps", 10]
    assert run_main(SCRIPT, "--env-id", env_id, *given, *options).code == 0
    (config,) = Path().rglob("config.json")
    args = json.loads(config.read_text())["args"]
    assert {name: args[name] for name in flags} == flags
    assert args["critic_lr"] == args["policy_lr"] == args["encoder_lr"] == 3e-4
    for row in read(config.parent):
        low, high = getattr(FAMILIES[env_id], row["split"])
        assert low <= float(row["goal"]) <= high


def parsed(monkeypatch, *args: str) -> dict:
    monkeypatch.setattr("sys.argv", ["pearl_hyper.py", *args])
    return vars(pearl_hyper.parse_args())


def test_the_defaults_are_the_papers_run(monkeypatch):
    args = parsed(monkeypatch)
    expected = dict(env_id="HalfCheetahVelMedium-v0", model="hyper", context="learned")
    expected |= dict(num_iterations=400, num_initial_steps=2000, num_collect_goals=5, horizon=200)
    expected |= dict(batch_size=256, buffer_size=1_000_000, latent_dim=5, kl_weight=0.1)
    expected |= dict(gamma=0.99, tau=0.005, reward_scale=5.0, policy_reg=1e-3)
    expected |= dict(critic_lr=5e-5, policy_lr=1e-4, encoder_lr=3e-4)
    expected |= dict(primary_widths=(256, 512, 1024), dynamic_width=256, hyper_init="released")
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(
    "env_id, numbers",
    [
        ("HalfCheetahFwdBack-v0", (2, 2, 1000, 1000, 2000, 4, 256, 4)),
        ("AntFwdBack-v0", (2, 2, 400, 600, 4000, 4, 256, 2)),
        ("HalfCheetahVel-v0", (100, 30, 400, 600, 2000, 16, 100, 1)),
        ("AntVel-v0", (100, 30, 400, 600, 2000, 16, 100, 1)),
        ("HalfCheetahVelMedium-v0", (100, 30, 400, 600, 2000, 16, 100, 1)),
    ],
)
def test_every_family_has_the_released_numbers(env_id, numbers, monkeypatch):
    args = parsed(monkeypatch, "--env-id", env_id)
    names = "num_train_goals num_test_goals num_prior_steps num_posterior_steps num_train_steps"
    names += " meta_batch_size context_batch_size eval_episodes"
    assert tuple(args[name] for name in names.split()) == numbers


@pytest.mark.parametrize(
    "args, words",
    [
        (["--env-id", "Hopper-v4"], ["Hopper-v4", "choose from", "HalfCheetahVelMedium-v0"]),
        (["--model", "vanilla"], ["--model", "mlp", "hyper"]),
        (["--context", "goal"], ["--context", "learned", "oracle"]),
        (["--num-prior-steps", "0"], ["--num-prior-steps 0", "at least 1"]),
        (["--num-posterior-steps", "-1"], ["--num-posterior-steps -1", "at least 0"]),
        (["--meta-batch-size", "0"], ["--meta-batch-size 0", "at least 1"]),
        (["--kl-weight", "-1"], ["--kl-weight -1", "at least 0"]),
        (["--encoder-lr", "nan"], ["--encoder-lr nan"]),
        (["--gamma", "1.5"], ["--gamma 1.5", "[0, 1]"]),
        (["--tau", "-0.1"], ["--tau -0.1", "[0, 1]"]),
        (["--primary-widths", "0"], ["--primary-widths"]),
        (["--seed", "-1"], ["--seed -1", "at least 0"]),
        (["--bach-size", "3"], ["--bach-size"]),
        (["--runs-dir", "/dev/null/runs"], ["--runs-dir /dev/null/runs", "cannot write"]),
    ],
)
def test_bad_use_is_one_line_and_leaves_nothing_behind(run_main, tmp_path, args, words):
    assert_refused(run_main(SCRIPT, *args), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_non_finite_loss_stops_the_run_and_leaves_the_last_checkpoint(run_main):
    assert run_main(SCRIPT, *small(1)).code == 0
    checkpoint = (RUN_DIR / "checkpoint.pt").read_bytes()
    config = RUN_DIR / "config.json"
    config.write_text(config.read_text().replace('"reward_scale": 5.0', '"reward_scale": 1e+30'))
    finished = run_main(SCRIPT, *small(2), "--reward-scale", 1e30)
    assert_refused(finished, "q_loss is not finite at iteration 1", code=1)
    assert (RUN_DIR / "checkpoint.pt").read_bytes() == checkpoint


def test_weights_that_the_last_update_ruins_stop_the_run_before_a_checkpoint(run_main):
    options = ["--num-train-steps", 1, "--policy-lr", 1e38]  # the losses are those before the step
    finished = run_main(SCRIPT, *small(2), *options)
    assert_refused(finished, "weight is not finite at iteration 0", code=1)
    assert not list(RUN_DIR.glob("checkpoint*"))


def test_a_non_finite_reward_stops_the_collection(capsys):
    agent, args = make_agent(1, 1)
    envs = PointMass("", [0.5, math.nan], 1)
    with pytest.raises(SystemExit) as end:
        rollout(agent.policy, torch.zeros(2, 5), envs, np.ones(2, bool), np.random.default_rng(0))
    assert end.value.code == 1 and "goal nan: an observation" in capsys.readouterr().err


def test_help_tells_of_every_option_what_it_does_its_default_and_its_source(run_main):
    finished = run_main(SCRIPT, "--help")
    assert finished.code == 0
    introduction, options = finished.out.replace("│", " ").split(" options ", 1)
    assert "python pearl_hyper.py --env-id HalfCheetahVelMedium-v0 --model hyper" in introduction
    options = [" ".join(option.split()) for option in re.split(r"\n +--(?=[a-z])", options)[1:]]
    assert [o.split()[0].replace("-", "_") for o in options] == list(vars(Args()))
    for option in options[[o.split()[0] for o in options].index("model") :]:
        assert "(released" in option or "(paper" in option or "hyper-init" in option, option


def test_what_maml_and_pearl_share_is_equal_to_the_letter():
    maml, pearl = top_level("maml_hyper.py"), top_level("pearl_hyper.py")
    algorithm = {"Args", "AT_LEAST", "parse_args", "Policy", "Batch", "log_prob"}
    algorithm |= {"update", "record_video"}
    shared = (maml.keys() & pearl.keys()) - algorithm
    assert len(shared) >= 13 and "load_checkpoint" in shared
    for name in shared - {"claim_run"}:
        assert maml[name] == pearl[name], name
    # The run directory names the oracle.
    folder = (
        '    model = args.model if args.context == "learned" else f"{args.model}-{args.context}"\n'
    )
    ours = pearl["claim_run"].replace(folder, "").replace("env_id, model,", "env_id, args.model,")
    assert ours == maml["claim_run"]


# Learning: with the goal at -1 or +1, a point mass that does not know which returns about -20.

POINT = ["--env-id", "HalfCheetahVel-v0", "--num-train-goals", 2, "--num-test-goals", 2]
POINT += ["--num-initial-steps", 200, "--num-collect-goals", 4, "--num-prior-steps", 40]
POINT += ["--num-posterior-steps", 40, "--horizon", 20, "--eval-episodes", 8, "--latent-dim", 2]
POINT += ["--num-iterations", 8, "--num-train-steps", 100, "--meta-batch-size", 4]
POINT += ["--batch-size", 32, "--context-batch-size", 40, "--gamma", 0.9, "--tau", 0.02]
POINT += ["--critic-lr", 1e-3, "--policy-lr", 1e-3, "--encoder-lr", 3e-3, "--kl-weight", 0.01]
POINT += ["--reward-scale", 10, "--primary-widths", 32, 64, "--dynamic-width", 64]
POINT += ["--hyper-init", "paper"]


def gain_of_adaptation(run_main, monkeypatch, script: Path, model: str) -> float:
    """Return on the test goals after minus before adaptation, median of the last 4 evaluations."""
    family = Family("point", (-1.0, 1.0), (-1.0, 1.0), False, 0.0, 0.0)
    monkeypatch.setitem(meta_envs.FAMILIES, "HalfCheetahVel-v0", family)
    monkeypatch.setattr(meta_envs, "MetaVectorEnv", PointMass)
    finished = run_main(script, *POINT, "--model", model)
    assert finished.code == 0, finished.err
    rows = [row for row in read(next(Path().rglob("seed1"))) if row["split"] == "test"]
    pre, post = (
        np.array([float(row["return"]) for row in rows if row["phase"] == phase]).reshape(-1, 2)
        for phase in ("pre", "post")
    )
    gains = (post - pre).mean(1)  # of the two goals, in each evaluation
    return np.median(gains[-4:])


@MODELS
def test_pearl_finds_the_goal_after_adaptation(run_main, monkeypatch, model):
    assert gain_of_adaptation(run_main, monkeypatch, SCRIPT, model) > 6


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("z = mean + variance.sqrt() * z", "pass"),  # z from the prior in place of the posterior
        ("policy_reg * regularisation - y.mean()", "policy_reg * regularisation + y.mean()"),
    ],
    ids=["prior for posterior", "sign of the policy's loss"],
)
def test_broken_pearl_does_not(run_main, monkeypatch, tmp_path, right, wrong):
    source = SCRIPT.read_text()
    assert source.count(right) == 1
    broken = tmp_path / "pearl_hyper.py"
    broken.write_text(source.replace(right, wrong))
    assert gain_of_adaptation(run_main, monkeypatch, broken, "mlp") < 3
