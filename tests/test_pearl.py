"""PEARL: the posterior, where gradients go, what is collected and scored; the run; learning."""

import copy
import csv
import json
import math
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, assert_same_run, cosine, graph_of, scalars, start
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import meta_envs
import pearl_hyper
from meta_envs import FAMILIES, Family
from pearl_hyper import (
    Agent,
    Args,
    Batch,
    ReplayBuffer,
    Tasks,
    collect,
    evaluate,
    infer,
    kl_from_prior,
    log_prob,
    make_optimizers,
    make_tasks,
    product_of_gaussians,
    q_loss,
    rollout,
    sample_batch,
    update,
    v_and_policy_loss,
)

SCRIPT = ROOT / "pearl_hyper.py"
OBS, ACTION, T, N, M = 4, 2, 3, 5, 7
GOALS = np.array([-1.0, 0.5, 2.0])
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
        linears = [layer for layer in net.layers if isinstance(layer, torch.nn.Linear)]
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
    agent.encoder.net.layers[-1].bias.data -= 200
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
def test_losses_and_gradients_equal_the_equations_with_every_transition_a_task_of_its_own(
    model, context
):
    agent, args = make_agent(model=model, context=context, gamma=0.9, policy_reg=0.01)
    batch, z_noise, noise = make_batch(args)
    z, _ = infer(agent, batch.context, z_noise)
    v_loss, policy_loss = v_and_policy_loss(agent, batch, z, noise, args)
    losses = {"q": q_loss(agent, batch, z, args), "v": v_loss, "policy": policy_loss}

    columns = (x.flatten(0, 1).unsqueeze(1) for x in (*batch[:5], noise))
    obs, action, reward, next_obs, terminated, noise = columns  # (T * N, 1, ...)
    z = z.repeat_interleave(N, 0).unsqueeze(1)
    with torch.no_grad():
        target = 5 * reward + 0.9 * (1 - terminated) * agent.target_v(next_obs, z)
    expected = {"q": sum((q(obs, action, z) - target).square().mean() for q in agent.q)}
    z = z.detach()
    mean, log_std = agent.policy.dynamic(agent.policy.generate(z.squeeze(1)), obs)
    u = mean + log_std.exp() * noise
    slope = (1 - u.tanh().square()).log().sum(-1)
    y = torch.min(*(q(obs, u.tanh(), z) for q in agent.q))
    y = y - (Normal(mean, log_std.exp()).log_prob(u).sum(-1) - slope)
    expected["v"] = (agent.v(obs, z) - y.detach()).square().mean()
    expected["policy"] = 0.01 * (mean.square().mean() + log_std.square().mean()) - y.mean()
    for name, loss in losses.items():
        weights = [*getattr(agent, name).parameters()]
        if name == "q" and agent.encoder:
            weights += agent.encoder.parameters()
        pair = (loss, expected[name])
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
        gradients = (torch.autograd.grad(x, weights, retain_graph=True) for x in pair)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@MODELS
def test_bfloat16_has_the_losses_and_gradients_of_float32(model):
    """Losses within 2 %, gradients with a cosine of at least 0.98; what leaves them is float32."""
    results = {}
    for precision in ("float32", "bfloat16"):
        options = dict(primary_widths=(64, 128), dynamic_width=32, precision=precision)
        agent, args = make_agent(model=model, **options)
        batch, z, noise = make_batch(args)
        v_loss, policy_loss = v_and_policy_loss(agent, batch, z, noise, args)
        losses = {"q": q_loss(agent, batch, z, args), "v": v_loss, "policy": policy_loss}
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, [*getattr(agent, name).parameters()])
            assert {x.dtype for x in (loss, *gradients)} == {torch.float32}
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            results[precision, name] = (loss.item(), flat)
    for name in losses:
        (loss, gradient), (loss_16, gradient_16) = (
            results[p, name] for p in ("float32", "bfloat16")
        )
        assert loss_16 == pytest.approx(loss, rel=0.02) and loss_16 != loss, name
        assert cosine(gradient, gradient_16) > 0.98, name


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


def test_the_oracle_is_the_goal_with_no_encoder_and_no_kl():
    agent, args = make_agent(context="oracle")
    batch, z_noise, _ = make_batch(args)
    z, kl = infer(agent, batch.context, z_noise)
    assert agent.encoder is None and kl == 0 and torch.equal(z, batch.context)
    assert set(make_optimizers(agent, args)) == {"q", "v", "policy"}
    agent, args = make_agent(1, 1, context="oracle")
    tasks, rng = make_tasks(GOALS, 1, 1, args), np.random.default_rng(0)
    for posterior in (False, True):
        envs = PointMass("", GOALS, 2)
        collect(agent, envs, tasks, np.arange(3), 40, rng, args, posterior=posterior)
    assert tasks.encoder_buffer.added == [0, 0, 0]
    batch = sample_batch(tasks, rng, args)
    assert batch.context.shape == (T, 1) and set(batch.context.flatten().tolist()) <= {*GOALS}
    reward = -(batch.next_obs.squeeze(-1) - batch.context).square()
    torch.testing.assert_close(batch.reward, reward, atol=1e-5, rtol=0)  # of the task of the goal


# Data


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
    buffer = ReplayBuffer(3, (48,), capacity=1_000_000, device="cpu")
    for _ in range(100):
        buffer.add(1, torch.zeros(200, 48))
    assert [len(data) // 20_000 for data in buffer.data] in ([0, 1, 0], [0, 2, 0])
    assert [len(data) for data in buffer.state_dict()["data"]] == [0, 20_000, 0]


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


def point_tasks(**options) -> tuple[Agent, Args, Tasks, np.random.Generator]:
    agent, args = make_agent(1, 1, **options)
    return agent, args, make_tasks(GOALS, 1, 1, args), np.random.default_rng(0)


def test_encoder_buffer_holds_only_prior_data_of_the_latest_collection():
    agent, args, tasks, rng = point_tasks()
    envs = PointMass("", GOALS, 3)
    chosen = np.array([2, 0, 2])  # of a task drawn twice, that of both draws
    for _ in range(2):
        before = list(tasks.buffer.added)
        for task in chosen:
            tasks.encoder_buffer.clear(task)
        assert collect(agent, envs, tasks, chosen, 40, rng, args, posterior=False) == 120
        added = zip(tasks.buffer.data, before, tasks.buffer.added)
        prior = [rows[i:j] for rows, i, j in added]
        assert collect(agent, envs, tasks, chosen, 60, rng, args, posterior=True) == 180
    assert tasks.buffer.added == [200, 0, 400] and tasks.encoder_buffer.added == [40, 0, 80]
    for task in chosen:
        encoder_rows = tasks.encoder_buffer.data[task][: tasks.encoder_buffer.added[task]]
        torch.testing.assert_close(encoder_rows, prior[task][:, :3])
        rows = tasks.buffer.data[task][: tasks.buffer.added[task]]
        obs, action, reward, next_obs, terminated = rows.T
        torch.testing.assert_close(next_obs, obs + 0.2 * action, atol=1e-5, rtol=0)
        torch.testing.assert_close(reward, -(next_obs - GOALS[task]).square().float())
        assert not terminated.any()  # time ran out: not the end


def test_posterior_is_recomputed_for_each_trajectory_and_the_prior_needs_none():
    agent, args, tasks, rng = point_tasks()
    envs = PointMass("", GOALS, 3)
    contexts, latents = inputs_of(agent.encoder), inputs_of(agent.policy.net.primary)
    collect(agent, envs, tasks, np.arange(3), 40, rng, args, posterior=False)
    assert contexts == []
    collect(agent, envs, tasks, np.arange(3), 60, rng, args, posterior=True)
    (context,) = contexts
    assert context.shape == (9, M, 3)  # of 3 trajectories of each of 3 tasks
    assert len({tuple(c.flatten().tolist()) for c in context}) == 9
    mean, variance = agent.encoder(context)
    z = (latents[-1] - mean) / variance.sqrt()
    assert z.abs().max() < 5 and z.std() > 0.5  # a sample of the posterior
    for latent in latents:
        assert len({tuple(z.tolist()) for z in latent}) == 9
    batch = sample_batch(tasks, rng, args)
    assert batch.context.shape == (T, M, 3) and batch.obs.shape == (T, N, 1)


def test_trajectories_that_end_early_are_whole_and_others_follow_until_the_steps_are_there():
    agent, args, tasks, rng = point_tasks()
    envs = PointMass("", GOALS, 2, edge=0.5)
    steps = collect(agent, envs, tasks, np.arange(3), 40, rng, args, posterior=False)
    assert steps == sum(tasks.buffer.added) and len(envs.log) > 1
    for task in range(3):
        assert 40 <= tasks.buffer.added[task] < 60
        obs, _, _, next_obs, terminated = tasks.buffer.data[task][: tasks.buffer.added[task]].T
        assert terminated.any() and (obs.abs() < 0.5).all()
        assert ((next_obs.abs() >= 0.5) == terminated.bool()).all()
        starts = obs[1:] != next_obs[:-1]
        assert (terminated[:-1].bool() <= starts).all()


def fix_policy(monkeypatch, mean: float, log_std: float) -> None:
    """Policies become u ~ N(mean * obs, std²)."""
    fixed = lambda self, generated, obs: (mean * obs, torch.full_like(obs, log_std))  # noqa: E731
    monkeypatch.setattr(pearl_hyper.Policy, "dynamic", fixed)


def test_an_action_has_noise_of_its_own_and_the_policys_std(monkeypatch):
    agent, _ = make_agent(1, 1)
    fix_policy(monkeypatch, 0.0, math.log(0.5))
    envs = PointMass("", [0.5], 10)
    rollout(agent.policy, torch.zeros(10, 5), envs, np.ones(10, bool), np.random.default_rng(0))
    noise = np.arctanh(envs.actions)  # (H, T, 1)
    assert len(np.unique(noise)) == 20 * 10 and noise.std() == pytest.approx(0.5, rel=0.2)


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
    result = evaluate(agent, envs, args)
    assert len(envs.log) == 3 and all(mask.all() for mask in envs.log)
    first, second, third = (r.reshape(3, 2).mean(1) for r in (*returns[1:], envs.returns))
    np.testing.assert_allclose(result["post"], third, rtol=1e-5)
    np.testing.assert_allclose(result["pre"], (first + second) / 2, rtol=1e-5)
    # The context of a scored trajectory is all of its own two others, and no more.
    assert [c.shape for c in contexts] == [(1, length, 3) for length in lengths[1] + lengths[2]]
    assert all((context[..., 0].abs() < edge).all() for context in contexts)


def test_evaluation_is_deterministic_and_reseeded(monkeypatch):
    agent, args = make_agent(1, 1)
    actions = []
    for log_std in (-3.0, 2.0):
        fix_policy(monkeypatch, 0.5, log_std)
        envs = PointMass("", GOALS, 2)
        evaluate(agent, envs, args)
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
    latents = inputs_of(agent.policy.net.primary)
    envs = PointMass("", [0.5, 2.0], 2)
    assert list(evaluate(agent, envs, args)) == ["post"] and len(envs.log) == 1
    assert latents[0].flatten().tolist() == [0.5, 0.5, 2.0, 2.0]


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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_killed_twice_ends_like_one_never_killed(run_main, tmp_path, precision):
    args = [*small(5), "--precision", precision]
    assert run_main(SCRIPT, *args, "--runs-dir", "whole").code == 0
    # Before the new checkpoint is in place: of iteration 2, and then of iteration 3
    for rename in (7, 7):
        script = ROOT / "tests" / "kill_in_checkpoint.py"
        process = start(script, rename, SCRIPT, *args, cwd=tmp_path)
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
    finished = run_main(SCRIPT, *args)
    assert finished.code == 0 and "iteration 2 of 5" in finished.out, finished
    whole = Path("whole", *RUN_DIR.parts[1:])
    assert_same_run(RUN_DIR, whole, 5)
    for name, values in scalars(RUN_DIR).items():
        expected = scalars(whole)[name]
        assert [step for step, _ in values] == [step for step, _ in expected], name  # none twice
        assert values == expected or name == "charts/SPS"
    assert_refused(run_main(SCRIPT, *args, "--kl-weight", 1), "kl_weight was 0.1 and is 1.0")


@MODELS
@CONTEXTS
def test_run_directory_holds_what_it_should(run_main, model, context):
    args = [*small(3), "--model", model, "--context", context, "--eval-every", 2]
    assert run_main(SCRIPT, *args).code == 0
    learned = context == "learned"
    folder = model if learned else f"{model}-oracle"
    run_dir = Path("runs/pearl_hyper/HalfCheetahVel-v0", folder, "seed1")
    rows = read(run_dir)
    assert list(rows[0]) == ["iteration", "env_steps", "split", "goal", "phase", "return"]
    phases = ["pre", "post"] if learned else ["post"]
    splits = ["train", "train", "test", "test"]
    kinds = [(i, phase, split) for i in "023" for phase in phases for split in splits]
    assert [(row["iteration"], row["phase"], row["split"]) for row in rows] == kinds
    # 3 tasks of 40 steps once; then 2 tasks of 20 and 30 steps, the latter in trajectories of 20
    assert [int(row["env_steps"]) for row in rows[:: 4 * len(phases)]] == [0, 360, 480]
    goals = [{r["goal"] for r in rows if r["split"] == split} for split in ("train", "test")]
    assert len(goals[0]) == len(goals[1]) == 2 and not goals[0] & goals[1]
    summary = json.loads((run_dir / "summary.json").read_text())
    last = np.mean([float(row["return"]) for row in rows[-2:]])
    assert summary["test_post_return"] == pytest.approx(last)
    assert summary["iteration"] == 3 and summary["env_steps"] == 480
    means = [f"eval/{split}_{phase}_return" for phase in phases for split in ("train", "test")]
    losses = [f"losses/{name}" for name in ("kl", "q_loss", "v_loss", "policy_loss")]
    steps = dict.fromkeys([*means, "charts/SPS"], [0, 2, 3])
    steps |= dict.fromkeys([*losses, "charts/env_steps"], [0, 1, 2])
    assert {name: [i for i, _ in values] for name, values in scalars(run_dir).items()} == steps
    new, old = (torch.load(run_dir / f"checkpoint{x}.pt", weights_only=True) for x in ("", ".prev"))
    critic_lr, policy_lr = (5e-5, 1e-4) if model == "hyper" else (3e-4, 3e-4)
    rates = {"q": critic_lr, "v": critic_lr, "policy": policy_lr}
    for name, lr in (rates | ({"encoder": 3e-4} if learned else {})).items():
        assert new[name]["param_groups"][0]["lr"] == lr
        assert {state["step"].item() for state in new[name]["state"].values()} == {3 * 3}
    # The encoder's buffer holds the 20 steps of each of a task's last draws, or nothing at all.
    draws = np.subtract(new["buffer"]["added"], old["buffer"]["added"]) // (20 + 40)
    added = np.where(draws, 20 * draws, old["encoder_buffer"]["added"]) * learned
    assert draws.sum() == 2 and new["encoder_buffer"]["added"] == added.tolist()


def test_every_argument_of_the_method_changes_the_numbers(run_main, monkeypatch):
    monkeypatch.setattr(meta_envs, "MetaVectorEnv", PointMass)
    other = dict(model="mlp", context="oracle", primary_widths=(9,), dynamic_width=9)
    other |= dict(hyper_init="paper", latent_dim=3, kl_weight=9.0, num_train_goals=4)
    other |= dict(num_test_goals=3, num_initial_steps=60, num_collect_goals=3, num_prior_steps=40)
    other |= dict(num_posterior_steps=0, num_train_steps=4, meta_batch_size=3, batch_size=9)
    other |= dict(context_batch_size=9, buffer_size=30, horizon=21, gamma=0.5, tau=0.5)
    other |= dict(reward_scale=9.0, policy_reg=9.0, critic_lr=1e-2, policy_lr=1e-2, encoder_lr=1e-2)
    other |= dict(seed=2, eval_episodes=2, precision="bfloat16")
    free = {"env_id", "num_iterations", "eval_every", "checkpoint_every", "save_every"}
    free |= {"device", "runs_dir", "exp_name", "track"}
    assert other.keys() == vars(Args()).keys() - free
    content = {}
    for name, value in (("nothing", None), *other.items()):
        values = value if isinstance(value, tuple) else (value,)
        flag = [] if value is None else [f"--{name.replace('_', '-')}", *values]
        options = ["--num-iterations", 2, "--eval-every", 2, "--runs-dir", name]
        assert run_main(SCRIPT, *SMALL, *options, *flag).code == 0
        content[name] = next(Path(name).rglob("eval.csv")).read_text()
    same = [name for name in other if content[name] == content["nothing"]]
    assert not same and len({*content.values()}) == len(content)


@MODELS
@pytest.mark.parametrize("env_id", FAMILIES)
def test_every_family_runs_with_the_arguments_given_and_goals_of_its_split(run_main, env_id, model):
    flags = dict(num_train_goals=2, num_test_goals=2, meta_batch_size=2, context_batch_size=2)
    flags |= dict(num_train_steps=1, eval_episodes=1, num_prior_steps=10, num_posterior_steps=10)
    given = [x for name, value in flags.items() for x in (f"--{name.replace('_', '-')}", value)]
    options = ["--horizon", 10, "--num-initial-steps", 10, "--batch-size", 4, "--model", model]
    options += ["--num-collect-goals", 1, "--num-iterations", 1, *SMALL[2:7]]
    assert run_main(SCRIPT, "--env-id", env_id, *options, *given).code == 0
    (config,) = Path().rglob("config.json")
    args = json.loads(config.read_text())["args"]
    assert {name: args[name] for name in flags} == flags
    for row in read(config.parent):
        low, high = getattr(FAMILIES[env_id], row["split"])
        assert low <= float(row["goal"]) <= high


def test_the_defaults_are_the_papers_run_and_the_familys_numbers():
    expected = dict(env_id="HalfCheetahVelMedium-v0", model="hyper", context="learned")
    expected |= dict(num_iterations=400, num_initial_steps=2000, num_collect_goals=5, horizon=200)
    expected |= dict(batch_size=256, buffer_size=1_000_000, latent_dim=5, kl_weight=0.1)
    expected |= dict(gamma=0.99, tau=0.005, reward_scale=5.0, policy_reg=1e-3)
    expected |= dict(critic_lr=5e-5, policy_lr=1e-4, encoder_lr=3e-4)
    expected |= dict(primary_widths=(256, 512, 1024), dynamic_width=256, hyper_init="released")
    assert expected.items() <= vars(Args()).items()
    args = Args(model="mlp")
    assert args.critic_lr == args.policy_lr == args.encoder_lr == 3e-4
    names = "num_train_goals num_test_goals num_prior_steps num_posterior_steps num_train_steps"
    names += " meta_batch_size context_batch_size eval_episodes"
    velocities = (100, 30, 400, 600, 2000, 16, 100, 1)
    directions = {
        "HalfCheetahFwdBack-v0": (2, 2, 1000, 1000, 2000, 4, 256, 4),
        "AntFwdBack-v0": (2, 2, 400, 600, 4000, 4, 256, 2),
    }
    for env_id in FAMILIES:
        args = vars(Args(env_id=env_id))
        assert tuple(args[name] for name in names.split()) == directions.get(env_id, velocities)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--env-id", "Hopper-v4"], ["--env-id Hopper-v4: choose from", "HalfCheetahVelMedium-v0"]),
        (["--model", "vanilla"], ["--model", "mlp", "hyper"]),
        (["--context", "goal"], ["--context", "learned", "oracle"]),
        (["--num-prior-steps", "0"], ["--num-prior-steps 0: must be between 1"]),
        (["--num-posterior-steps", "-1"], ["--num-posterior-steps -1: must be between 0"]),
        (["--tau", "1.5"], ["--tau 1.5: must be between 0 and 1"]),
    ],
)
def test_bad_use_is_refused_and_leaves_nothing_behind(run_main, tmp_path, args, words):
    assert_refused(run_main(SCRIPT, *args), *words)
    assert list(tmp_path.iterdir()) == []


def test_non_finite_numbers_stop_the_run_and_leave_the_last_checkpoint(run_main, monkeypatch):
    finished = run_main(SCRIPT, *small(2), "--reward-scale", 1e18, "--critic-lr", 1e18)
    assert_refused(finished, "kl is not finite at iteration 0", code=1)

    def ruin(optimizer):  # the losses, which are those before the step, do not tell
        optimizer.param_groups[0]["params"][0].data *= math.nan

    options = ["--num-train-steps", 1, "--policy-lr", 0.5, "--runs-dir", "other"]
    step = torch.optim.Adam.step
    is_policy = lambda optimizer: optimizer.defaults["lr"] == 0.5  # noqa: E731
    monkeypatch.setattr(torch.optim.Adam, "step", lambda x: ruin(x) if is_policy(x) else step(x))
    finished = run_main(SCRIPT, *small(2), *options)
    assert_refused(finished, "weight is not finite at iteration 0", code=1)
    for checkpoint in Path().rglob("checkpoint.pt"):
        assert torch.load(checkpoint, weights_only=True)["step"] == 0


def test_a_non_finite_reward_stops_the_collection(capsys):
    agent, args = make_agent(1, 1)
    envs = PointMass("", [0.5, math.nan], 1)
    with pytest.raises(SystemExit) as end:
        rollout(agent.policy, torch.zeros(2, 5), envs, np.ones(2, bool), np.random.default_rng(0))
    assert end.value.code == 1 and "goal nan: an observation" in capsys.readouterr().err


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


def test_pearl_that_never_looks_at_its_context_does_not(run_main, monkeypatch, tmp_path):
    source, right = SCRIPT.read_text(), "z, _ = infer(agent, context, z)"
    assert source.count(right) == 1
    broken = tmp_path / "pearl_hyper.py"
    broken.write_text(source.replace(right, "pass"))  # z stays a sample of the prior
    assert gain_of_adaptation(run_main, monkeypatch, broken, "mlp") < 3
