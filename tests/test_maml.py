"""Meta-gradient, TRPO and baseline against finite differences, double backward and loops."""

from copy import deepcopy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import cosine
from torch.distributions import Independent, Normal, kl_divergence
from torch.func import functional_call
from torch.nn.functional import one_hot
from torch.nn.utils import parameters_to_vector
from torch.utils._pytree import tree_map

import maml_hyper
from maml_hyper import Args, Batch, Gaussian, MetaBatch, Policy, Rollout
from meta_envs import MetaVectorEnv

MODELS = ("vanilla", "context", "hyper")
T, N, OBS, ACTION = 3, 6, 5, 2


def make_args(model: str, **changes) -> Args:
    small = dict(primary_widths=(4, 5, 6), dynamic_width=7, inner_lr=0.01, meta_batch_size=T)
    return Args(model=model, device="cpu", **(small | changes))


def make_policy(args: Args, noise: float = 0.1) -> Policy:
    """A small policy in double precision with every weight away from zero."""
    torch.manual_seed(0)
    policy = Policy(OBS, ACTION, args).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += noise * torch.randn(parameter.shape)
    return policy


def make_batches(num: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator).double()

    context, batches = normal(T, 1), []
    for _ in range(num):
        weight = torch.rand(T, N, generator=generator).double()
        weight[0, 4:] = 0  # an early end
        weight /= weight.sum(1, keepdim=True)
        sizes = (T, N, OBS), (T, N, ACTION), (T, N)
        batches.append(Batch(context, *(normal(*size) for size in sizes), weight))
    return batches


def make_task(model: str, **changes) -> tuple[Args, Policy, torch.Tensor, MetaBatch, Gaussian]:
    """Arguments, policy, its θ, data of T tasks as if sampled by π_{θ_i}, and the π_{θ_i}."""
    args = make_args(model, **changes)
    policy = make_policy(args)
    theta = parameters_to_vector(policy.parameters()).detach()
    *pre, post = make_batches(args.num_adapt_steps + 1)
    inner_steps, parameters = [], maml_hyper.by_name(policy, theta)
    for batch in pre:
        inputs = (policy, parameters, inner_steps, batch, args.inner_lr)
        step = maml_hyper.inner_step(*inputs, second_order=False)
        inner_steps.append(tree_map(torch.detach, step))
    meta_batch = MetaBatch(pre, inner_steps, post)
    with torch.no_grad():
        old = maml_hyper.adapted_outputs(policy, theta, meta_batch, args)
    return args, policy, theta, meta_batch, old


def surrogate_and_kl(policy, theta, meta_batch, old, args) -> torch.Tensor:
    new = maml_hyper.adapted_outputs(policy, theta, meta_batch, args)
    return maml_hyper.surrogate_and_kl(new, old, meta_batch.post, args)


@pytest.mark.parametrize("num_adapt_steps", [0, 2])
@pytest.mark.parametrize("model", MODELS)
def test_meta_gradient_equals_finite_differences_through_the_inner_steps(model, num_adapt_steps):
    args, policy, theta, task, old = make_task(model, num_adapt_steps=num_adapt_steps)
    gradient, policies = maml_hyper.meta_gradient(policy, theta, task, args)
    assert all(torch.equal(a, b) for a, b in zip(policies, old))
    chosen = torch.cat([gradient.abs().topk(40).indices, torch.randperm(len(theta))[:40]])
    differences = torch.empty_like(theta[chosen])
    with torch.no_grad():
        for i, direction in enumerate(one_hot(chosen, len(theta))):
            moved = theta + 1e-5 * direction, theta - 1e-5 * direction
            (up, _), (down, _) = (surrogate_and_kl(policy, x, task, old, args) for x in moved)
            differences[i] = (up - down) / 2e-5
    assert (differences - gradient[chosen]).norm() <= 1e-5 * differences.norm()


@pytest.mark.parametrize("model", MODELS)
def test_first_order_cuts_the_inner_step_and_differs(model):
    args, policy, theta, task, _ = make_task(model)
    second_order, _ = maml_hyper.meta_gradient(policy, theta, task, args)
    first_order, _ = maml_hyper.meta_gradient(policy, theta, task, replace(args, first_order=True))
    assert (second_order - first_order).norm() > 1e-3 * second_order.norm()
    # It is the gradient at the adapted parameters: θ moves, the inner step does not.
    theta_i, post = theta.clone().requires_grad_(), task.post
    with maml_hyper.adapted(policy, task.inner_steps):
        adapted = functional_call(policy, maml_hyper.by_name(policy, theta_i), post[:2])
    (post.sample_weight * post.advantage * adapted.log_prob(post.action)).sum().div(T).backward()
    torch.testing.assert_close(theta_i.grad, first_order, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_adapted_layers_act_as_a_copy_of_all_parameters_a_task_would(model, monkeypatch):
    args, policy, _, meta_batch, adapted = make_task(model, num_adapt_steps=3, inner_lr=0.05)
    monkeypatch.setattr(maml_hyper, "CHUNK", 1)
    for i, task in enumerate(maml_hyper.split_tasks(meta_batch)):
        copy = deepcopy(policy)
        optimizer = torch.optim.SGD(copy.parameters(), args.inner_lr, maximize=True)
        for batch in task.pre:
            mean, log_std = copy(batch.context, batch.obs)
            log_prob = Independent(Normal(mean, log_std.exp()), 1).log_prob(batch.action)
            optimizer.zero_grad()
            (batch.sample_weight * batch.advantage * log_prob).sum().backward()
            optimizer.step()
        own = copy(task.post.context, task.post.obs)
        torch.testing.assert_close([x[i : i + 1] for x in adapted], [*own], rtol=1e-9, atol=1e-9)
        assert (own.mean - policy(task.post.context, task.post.obs).mean).abs().max() > 1e-3


@pytest.mark.parametrize("steps, first", [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("model", MODELS)
def test_fisher_product_is_the_hessian_of_the_kl_times_a_vector(model, steps, first):
    args, policy, theta, task, old = make_task(model, num_adapt_steps=steps, first_order=first)
    vector = torch.randn_like(theta)
    product = maml_hyper.fisher_product(policy, theta, task, vector, args)
    leaf = theta.clone().requires_grad_()
    _, kl = surrogate_and_kl(policy, leaf, task, old, args)
    gradient = torch.autograd.grad(kl, leaf, create_graph=True)[0]
    hessian = torch.autograd.grad(gradient.dot(vector), leaf)[0]
    assert kl.abs() < 1e-12 and gradient.norm() < 1e-9
    assert (product - hessian).norm() <= 1e-6 * hessian.norm()


@pytest.mark.parametrize("model", MODELS)
def test_an_update_fills_the_trust_region_however_the_tasks_are_split(model, monkeypatch):
    results = []
    for chunk, num_chunks in ((1, T), (2 * N, 2), (100 * N, 1)):
        monkeypatch.setattr(maml_hyper, "CHUNK", chunk)
        args, policy, _, meta_batch, _ = make_task(model, max_kl=0.01)
        assert len(maml_hyper.split_tasks(meta_batch)) == num_chunks
        result = maml_hyper.update(policy, meta_batch, args)
        results.append((parameters_to_vector(policy.parameters()).detach(), result))
    for theta, result in results[1:]:
        torch.testing.assert_close(theta, results[0][0], rtol=1e-6, atol=1e-8)
        assert result == pytest.approx(results[0][1], rel=1e-6)
    assert 0 < result["kl"] <= 0.01 and result["surrogate"] > 0 and result["step_size"] > 0
    # The quadratic model is good: a full step would have the KL that it was made for
    assert result["kl"] == pytest.approx(0.01 * result["step_size"] ** 2, rel=0.5)


def test_surrogate_and_kl_are_those_of_torch_distributions():
    args, policy, theta, task, old = make_task("context", num_adapt_steps=0)
    moved, post = theta + 0.1 * torch.randn_like(theta), task.post
    new = maml_hyper.adapted_outputs(policy, moved, task, args)
    value, kl = maml_hyper.surrogate_and_kl(new, old, post, args)
    old, new = (Independent(Normal(m, s.exp().expand_as(m)), 1) for m, s in (old, new))
    ratio = (new.log_prob(post.action) - old.log_prob(post.action)).exp()
    torch.testing.assert_close(value, (post.sample_weight * post.advantage * ratio).sum() / T)
    torch.testing.assert_close(kl, (post.sample_weight * kl_divergence(old, new)).sum() / T)


def test_conjugate_gradient_solves_a_known_system():
    torch.manual_seed(0)
    root, x = torch.randn(20, 20).double(), torch.randn(20).double()
    matrix = root @ root.T + torch.eye(20)
    found = maml_hyper.conjugate_gradient(lambda v: matrix @ v, matrix @ x, iterations=60)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    products = []
    maml_hyper.conjugate_gradient(lambda v: products.append(0) or 2 * v, matrix @ x, iterations=9)
    assert len(products) == 1  # solved after one


def plain_advantages(obs, reward, lengths, gamma, lam):
    """The advantages of one task's episodes (E, H), one after another, by loops."""
    features, returns, advantages = [], [], []
    for e, length in enumerate(lengths):
        for t in range(length):
            time = t / 100
            features.append([*obs[e, t], *obs[e, t] ** 2, time, time**2, time**3, 1.0])
            returns.append(sum(gamma ** (k - t) * reward[e, k] for k in range(t, length)))
    X, y = np.array(features), np.array(returns)
    values = iter(X @ np.linalg.solve(X.T @ X + 1e-5 * np.eye(X.shape[1]), X.T @ y))
    for e, length in enumerate(lengths):
        value = [next(values) for _ in range(length)] + [0.0]
        delta = [reward[e, t] + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            advantages.append(sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)))
    return (advantages - np.mean(advantages)) / np.sqrt(np.var(advantages) + 1e-8)


@pytest.mark.parametrize("gamma, lam", [(0.95, 1.0), (0.99, 0.9)])
def test_baseline_and_advantages_equal_a_plain_loop_with_early_ends(gamma, lam):
    rng = np.random.default_rng(0)
    tasks, episodes, horizon = 2, 4, 12
    obs = rng.standard_normal((tasks, episodes, horizon, 3))
    action = rng.standard_normal((tasks, episodes, horizon, ACTION))
    lengths = rng.integers(1, horizon + 1, (tasks, episodes))
    lengths[0, 0], lengths[1, 1] = horizon, 1
    alive = np.arange(horizon) < lengths[..., None]
    reward = alive * rng.standard_normal(alive.shape)
    args = make_args("vanilla", gamma=gamma, gae_lambda=lam)
    batch = maml_hyper.make_batch(Rollout(torch.zeros(tasks, 1), obs, action, reward, alive), args)
    advantage, weight = (
        x.view(alive.shape).numpy() for x in (batch.advantage, batch.sample_weight)
    )
    for i in range(tasks):
        expected = plain_advantages(obs[i], reward[i], lengths[i], gamma, lam)
        np.testing.assert_allclose(advantage[i][alive[i]], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(weight[i], alive[i] / alive[i].sum(), rtol=1e-6)
    assert (advantage[~alive] == 0).all()
    np.testing.assert_allclose(batch.obs.view(obs.shape).numpy(), obs, rtol=1e-6)
    np.testing.assert_allclose(batch.action.view(action.shape).numpy(), action, rtol=1e-6)


@pytest.mark.parametrize("max_kl", [1e-4, 1e-2])
@pytest.mark.parametrize("length", [-1e-2, 1e-2, 1e-1, 100.0])
def test_line_search_accepts_no_worse_surrogate_and_no_kl_above_the_limit(max_kl, length):
    args, policy, theta, task, old = make_task("context", max_kl=max_kl)
    step = length * maml_hyper.meta_gradient(policy, theta, task, args)[0]
    found = maml_hyper.line_search(policy, step, [task], [old], args)
    moved = parameters_to_vector(policy.parameters()).detach()
    with torch.no_grad():
        before, _ = surrogate_and_kl(policy, theta, task, old, args)
        after, kl = surrogate_and_kl(policy, moved, task, old, args)
    if found["step_size"]:
        torch.testing.assert_close(moved, theta + found["step_size"] * step)
        assert after > before and kl <= max_kl
        assert found["kl"] == pytest.approx(kl.item())
        assert found["surrogate"] == pytest.approx((after - before).item(), rel=1e-6)
    else:
        assert torch.equal(moved, theta)
    assert bool(found["step_size"]) == (0 < length < 1)


@pytest.mark.parametrize("model", MODELS)
def test_a_rollout_generates_its_weights_once_and_ends_where_the_ant_falls(model, monkeypatch):
    args = make_args(model, horizon=15)
    envs, policy = MetaVectorEnv("AntVel-v0", [0.5, 2.0], 4, 1, args.horizon), Policy(27, 8, args)
    step, contexts, generate = envs.step, [], policy.generate

    def falling(actions):
        if envs.elapsed[5] == 5:
            envs.qpos[5, 2] = 3.0  # the second episode of the second goal
        return step(0 * actions)  # the others stand still

    envs.step = falling
    monkeypatch.setattr(policy, "generate", lambda c: contexts.append(c) or generate(c))
    rollout = maml_hyper.collect_episodes(policy, [], envs, np.random.default_rng(0), args)
    assert [context.tolist() for context in contexts] == [[[0.5], [2.0]]]
    expected = np.ones((2, 4, 15), bool)
    expected[1, 1, 6:] = False
    assert (rollout.alive == expected).all() and rollout.reward.shape == (2, 4, 15)


def test_policies_at_full_size_have_the_parameters_of_the_paper():
    policies = [Policy(20, 6, Args(model=model)) for model in MODELS]
    vanilla, context, hyper = (sum(p.numel() for p in x.parameters()) for x in policies)
    assert vanilla == 20 * 100 + 100 + 100 * 100 + 100 + 100 * 6 + 6 + 6
    assert context == vanilla + 100 and 13e6 < hyper < 14e6


class TargetEnvs:
    """Tasks that one can solve on paper: the reward is -(a - goal)², whatever the state."""

    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,))
    single_action_space = gym.spaces.Box(-3.0, 3.0, (1,))

    def __init__(self, goals, episodes_per_goal: int):
        self.goals, self.episodes_per_goal = np.array(goals), episodes_per_goal
        self.num_envs = len(goals) * episodes_per_goal

    def reset(self, seed):
        self.rng = np.random.default_rng(seed)
        return self.rng.standard_normal((self.num_envs, OBS)), {}

    def step(self, action):
        reward = -((action[:, 0] - np.repeat(self.goals, self.episodes_per_goal)) ** 2)
        no = np.zeros(self.num_envs, dtype=bool)
        return self.rng.standard_normal((self.num_envs, OBS)), reward, no, no, {}


@pytest.mark.parametrize("model", MODELS)
def test_vanilla_learns_to_adapt_and_context_and_hyper_need_no_adaptation(model):
    """Unaware of the goal, ±1.5, the best is action 0 and a reward below -1.5² = -2.25."""
    torch.manual_seed(1)
    small = dict(primary_widths=(8,), horizon=10, meta_batch_size=2, cg_iterations=5)
    args = make_args(model, inner_lr=0.3 if model == "vanilla" else 1e-3, **small)
    policy, rng = Policy(OBS, 1, args), np.random.default_rng(1)
    envs = TargetEnvs([-1.5, 1.5], episodes_per_goal=20)
    for _ in range(16):
        rollouts, pre, steps = maml_hyper.adapt_and_sample(policy, envs, rng, args)
        post = maml_hyper.make_batch(rollouts[-1], args)
        maml_hyper.update(policy, MetaBatch(pre, steps, post), args)
    rollouts, *_ = maml_hyper.adapt_and_sample(policy, envs, rng, args)
    returns = maml_hyper.mean_returns(rollouts)
    pre, post = (returns[phase].mean() / args.horizon for phase in ("pre", "post"))
    if model == "vanilla":
        assert pre < -2 and post > -1
    else:
        assert pre > -1 and post == pytest.approx(pre, abs=0.3)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_policies_have_the_surrogate_and_the_meta_gradient_of_float32(model):
    args = make_args(model, primary_widths=(32, 64), dynamic_width=32, num_adapt_steps=2)
    *pre, post = (Batch(*(x.float() for x in batch)) for batch in make_batches(3))
    task, results = MetaBatch(pre, [], post), []
    for args.precision in ("float32", "bfloat16"):
        policy = make_policy(args, noise=0.02).float()
        theta = parameters_to_vector(policy.parameters()).detach()
        gradient, old = maml_hyper.meta_gradient(policy, theta, task, args)
        inputs = (policy, dict(policy.named_parameters()), [], pre[0], args.inner_lr)
        step = maml_hyper.inner_step(*inputs, second_order=False)
        tensors = [gradient, *old, *(x for gain in step.values() for x in gain)]
        assert {x.dtype for x in tensors} == {torch.float32}
        direction = results[0][0] if results else gradient
        product = maml_hyper.fisher_product(policy, theta, task, direction, args)
        moved = theta + 0.1 * direction / direction.norm()
        with torch.no_grad():
            measured = surrogate_and_kl(policy, moved, task, old, args)
            base = maml_hyper.surrogate_and_kl(old, old, post, args)
        results.append((gradient, product, (measured - base).tolist()))
        assert maml_hyper.update(policy, task, args)["step_size"] > 0
    (*vectors, changes), (*vectors_16, changes_16) = results
    for a, b in zip(vectors, vectors_16):
        assert cosine(a, b) > 0.999 and not torch.equal(a, b)
    assert changes_16 == pytest.approx(changes, rel=0.05)
