"""MAML-TRPO: its update against a plain one, the baseline, episodes, learning, bfloat16."""

import numpy as np
import pytest
import reference_maml
import torch
from helpers import cosine
from torch.nn.utils import parameters_to_vector
from torch.utils._pytree import tree_map
from toy_envs import PointMass

import maml_hyper
from maml_hyper import Args, Batch, Gaussian, MetaBatch, Policy, Rollout

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
    theta = parameters_to_vector(policy.parameters())
    *pre, post = make_batches(args.num_adapt_steps + 1)
    inner_steps, parameters = [], policy.state_dict()
    for batch in pre:
        inputs = (policy, parameters, inner_steps, batch, args.inner_lr)
        step = maml_hyper.inner_step(*inputs, second_order=False)
        inner_steps.append(tree_map(torch.detach, step))
    meta_batch = MetaBatch(pre, inner_steps, post)
    with torch.no_grad():
        old = maml_hyper.adapted_outputs(policy, theta, meta_batch, args)
    return args, policy, theta, meta_batch, old


@pytest.mark.parametrize("num_adapt_steps, chunk", [(0, 1), (1, 2 * N), (2, 100 * N)])
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("model", MODELS)
def test_adapted_layers_act_as_a_copy_of_all_parameters_a_task_would(
    model, first_order, num_adapt_steps, chunk, monkeypatch
):
    monkeypatch.setattr(maml_hyper, "CHUNK", chunk)  # tasks one by one, two and one, all together
    options = dict(num_adapt_steps=num_adapt_steps, first_order=first_order, inner_lr=0.05)
    options |= dict(cg_iterations=4, cg_damping=0.02, max_kl=0.02)
    args, policy, theta, task, _ = make_task(model, **options)
    expected = reference_maml.update(policy, task.pre, task.post, args)
    result = maml_hyper.update(policy, task, args)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-9)
    assert 0 < result["kl"] <= 0.02 and result["surrogate"] > 0 and result["step_size"] > 0
    assert (parameters_to_vector(policy.parameters()) - theta).abs().max() > 1e-3


def test_without_an_improvement_an_update_changes_nothing():
    args, policy, theta, task, old = make_task("context")
    downhill = -maml_hyper.meta_gradient(policy, theta, task, args)[0]
    found = maml_hyper.line_search(policy, downhill, [task], [old], args)
    assert found == {"surrogate": 0, "kl": 0, "step_size": 0}
    assert torch.equal(parameters_to_vector(policy.parameters()), theta)


def test_conjugate_gradient_ends_when_the_system_is_solved():
    products, b = [], torch.arange(5.0)
    found = maml_hyper.conjugate_gradient(lambda v: products.append(0) or 2 * v, b, iterations=9)
    assert len(products) == 1 and torch.equal(found, b / 2)


def test_baseline_and_advantages_equal_a_plain_loop_with_early_ends():
    rng = np.random.default_rng(0)
    tasks, episodes, horizon = 2, 4, 12
    obs = rng.standard_normal((tasks, episodes, horizon, 3))
    action = rng.standard_normal((tasks, episodes, horizon, ACTION))
    lengths = rng.integers(1, horizon + 1, (tasks, episodes))
    lengths[0, 0], lengths[1, 1] = horizon, 1
    alive = np.arange(horizon) < lengths[..., None]
    reward = alive * rng.standard_normal(alive.shape)
    args = make_args("vanilla", gamma=0.99, gae_lambda=0.9)
    batch = maml_hyper.make_batch(Rollout(torch.zeros(tasks, 1), obs, action, reward, alive), args)
    advantage = batch.advantage.view(alive.shape).numpy()
    weight = batch.sample_weight.view(alive.shape).numpy()
    for i in range(tasks):
        expected = reference_maml.advantages(obs[i], reward[i], lengths[i], 0.99, 0.9)
        np.testing.assert_allclose(advantage[i][alive[i]], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(weight[i], alive[i] / alive[i].sum(), rtol=1e-6)
    assert (advantage[~alive] == 0).all()


@pytest.mark.parametrize("model", MODELS)
def test_a_rollout_generates_its_weights_once_and_ends_where_an_episode_ends(model, monkeypatch):
    args = make_args(model, horizon=15)
    envs, policy = PointMass("", [-0.5, 3.0], 4, 1, args.horizon, edge=0.5), Policy(1, 1, args)
    contexts, generate = [], policy.generate
    monkeypatch.setattr(policy, "generate", lambda c: contexts.append(c) or generate(c))
    rollout = maml_hyper.collect_episodes(policy, [], envs, np.random.default_rng(0), args)
    assert [context.tolist() for context in contexts] == [[[-0.5], [3.0]]]
    lengths = envs.rollouts[0].lengths.reshape(2, 4, 1)
    assert (rollout.alive == (np.arange(15) < lengths)).all() and len(np.unique(lengths)) > 1
    assert (rollout.reward[~rollout.alive] == 0).all()


def test_policies_at_full_size_have_the_parameters_of_the_paper():
    policies = [Policy(20, 6, Args(model=model)) for model in MODELS]
    vanilla, context, hyper = (sum(p.numel() for p in x.parameters()) for x in policies)
    assert vanilla == 20 * 100 + 100 + 100 * 100 + 100 + 100 * 6 + 6 + 6
    assert context == vanilla + 100 and 13e6 < hyper < 14e6


@pytest.mark.parametrize("model", MODELS)
def test_vanilla_learns_to_adapt_and_context_and_hyper_need_no_adaptation(model):
    """Unaware of the goal, ±1.5, a point mass has at most -1.5² = -2.25 a step."""
    torch.manual_seed(1)
    small = dict(primary_widths=(8,), horizon=10, meta_batch_size=2, cg_iterations=5)
    args = make_args(model, inner_lr=0.3 if model == "vanilla" else 1e-3, **small)
    policy, rng = Policy(1, 1, args), np.random.default_rng(1)
    envs = PointMass("", [-1.5, 1.5], 20, 1, args.horizon)
    for _ in range(16):
        rollouts, pre, steps = maml_hyper.adapt_and_sample(policy, envs, rng, args)
        post = maml_hyper.make_batch(rollouts[-1], args)
        maml_hyper.update(policy, MetaBatch(pre, steps, post), args)
    returns = maml_hyper.mean_returns(maml_hyper.adapt_and_sample(policy, envs, rng, args)[0])
    pre, post = (returns[phase].mean() / args.horizon for phase in ("pre", "post"))
    assert post > -1 and (pre < -2 if model == "vanilla" else pre > -1)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_policies_have_the_gradients_and_the_surrogate_of_float32(model):
    args = make_args(model, primary_widths=(32, 64), dynamic_width=32, num_adapt_steps=2)
    *pre, post = (Batch(*(x.float() for x in batch)) for batch in make_batches(3))
    task, results = MetaBatch(pre, [], post), []
    for args.precision in ("float32", "bfloat16"):
        policy = make_policy(args, noise=0.02).float()
        theta = parameters_to_vector(policy.parameters())
        direction = torch.ones_like(theta)
        gradient, old = maml_hyper.meta_gradient(policy, theta, task, args)
        product = maml_hyper.fisher_product(policy, theta, task, direction, args)
        with torch.no_grad():
            new = maml_hyper.adapted_outputs(policy, theta + 0.003 * gradient, task, args)
            measured = maml_hyper.surrogate_and_kl(new, old, post, args)
        assert {x.dtype for x in (gradient, product, measured, *old)} == {torch.float32}
        results.append((gradient, product, measured))
        assert maml_hyper.update(policy, task, args)["step_size"] > 0
    for a, b in zip(*results):
        assert cosine(a, b) > 0.999 and not torch.equal(a, b)
