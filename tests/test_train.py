"""`train` of each script: what it does in the environment, when it learns, and from what.

Each run is watched; learning rates so small that the networks stay as they are, or a stand-in for
the update, leave the policy that acted known.
"""

import inspect
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import reference_maml
import torch
from toy_envs import PointMass

import maml_hyper as maml
import pearl_hyper as pearl
import sac_hyper as sac
import td3_hyper as td3

STARTS, TOTAL, DELAY, SIGMA = 600, 1200, 3, 0.4
SMALL = dict(env_id="toy_envs:Diary-v0", critic="mlp-small", device="cpu", learning_starts=STARTS)
SMALL |= dict(total_timesteps=TOTAL, batch_size=16, eval_every=400, eval_episodes=3, tau=1e-12)
SMALL |= dict(actor_lr=1e-12, critic_lr=2e-12, buffer_size=1000)
OWN = {td3: dict(policy_frequency=DELAY, exploration_noise=SIGMA), sac: dict(alpha_lr=3e-12)}


def watch(patch, module, name: str, calls: list, clock=lambda: None) -> None:
    """Notes every call of the module's function from now on: its name, arguments and time."""
    function = getattr(module, name)
    signature = inspect.signature(function)

    def watched(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        calls.append(SimpleNamespace(name=name, time=clock(), **arguments))
        return function(*args, **kwargs)

    patch.setattr(module, name, watched)


@pytest.fixture(scope="module", params=[td3, sac], ids=["td3", "sac"])
def run(request, tmp_path_factory) -> SimpleNamespace:
    """A run of TD3 or SAC: its two environments, and the calls that updated the networks."""
    script, envs, updates, make_env = request.param, [], [], request.param.make_env
    runs_dir = str(tmp_path_factory.mktemp("runs"))
    args, init = script.Args(runs_dir=runs_dir, **SMALL, **OWN[script]), script.Agent.__init__

    def init_with_other_targets(agent, *args):
        init(agent, *args)
        for target in agent.targets:
            target.neg_()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Agent, "__init__", init_with_other_targets)
        patch.setattr(script, "make_env", lambda *a: envs.append(make_env(*a)) or envs[-1])
        for name in ("update_critics", "update_actor_and_targets"):
            watch(patch, script, name, updates, lambda: len(envs[0].unwrapped.transitions))
        script.train(args)
    critics, actor = ([u for u in updates if u.name[7] == letter] for letter in "ca")
    env, eval_env = (env.unwrapped for env in envs)
    obs, action, reward, next_obs, terminated, _ = map(np.array, zip(*env.transitions))
    action = (action - [2.5, 2]) / [2.5, 5]  # from the environment's bounds to [-1, 1]
    rows = np.column_stack([obs, action, reward, next_obs, terminated])
    return SimpleNamespace(**locals(), agent=updates[0].agent)


def assert_standard_normal(x: np.ndarray) -> None:
    """(n, dimensions) are like independent samples of N(0, 1)."""
    error = 5 / len(x) ** 0.5
    assert abs(x.mean(0)).max() < error and abs(x.std(0) - 1).max() < error
    neighbours = np.corrcoef(np.hstack([x[1:], x[:-1]]).T)
    assert abs(neighbours - np.eye(len(neighbours))).max() < error


def test_actions_are_uniform_over_their_whole_range_before_learning_starts(run):
    action, shares = run.action[:STARTS], np.array([0, 0.25, 0.5, 0.75, 1])
    for quantiles in np.quantile(action, shares, axis=0).T:
        np.testing.assert_allclose(quantiles, 2 * shares - 1, atol=0.1)
    assert abs(np.corrcoef(action.T)[0, 1]) < 0.2


def test_later_actions_are_the_policys_with_noise(run):
    obs, action, actor = torch.tensor(run.obs[STARTS:]), run.action[STARTS:], run.agent.actor
    with torch.no_grad():
        if run.script is td3:  # a = clip(π(s) + σ ε)
            noise = (action - actor(obs).numpy()) / SIGMA
            assert (abs(abs(action).max(0) - 1) < 1e-6).all()
        else:  # a = tanh(mean + std ε)
            mean, log_std = actor.mean_and_log_std(obs)
            noise = (np.arctanh(action) - mean.numpy()) / log_std.exp().numpy()
    assert_standard_normal(noise)


def test_critics_learn_at_every_step_and_td3s_actor_and_targets_at_every_third(run):
    steps = range(STARTS + 1, TOTAL + 1)
    assert [update.time for update in run.critics] == [*steps]
    delay = DELAY if run.script is td3 else 1
    assert [update.time for update in run.actor] == [*steps][delay - 1 :: delay]
    assert all(update.args is run.args for update in run.updates)
    # The actor learns after the critics, from the same transitions
    for first, then in zip(run.updates, run.updates[1:]):
        if then.name == "update_actor_and_targets":
            assert first.name == "update_critics" and first.batch is then.batch


def test_batches_are_drawn_from_the_last_1000_transitions_the_newest_included(run):
    number = {obs.tobytes(): i for i, obs in enumerate(run.obs)}
    ages, newest = [], 0
    for update in run.critics:
        columns = [x.numpy().reshape(16, -1) for x in update.batch]
        index = np.array([number[obs.tobytes()] for obs in columns[0]])
        np.testing.assert_allclose(np.hstack(columns), run.rows[index], rtol=1e-5, atol=1e-5)
        filled = min(update.time, 1000)
        age = update.time - 1 - index
        assert 0 <= age.min() and age.max() < filled
        ages.append((age + 0.5) / filled)
        newest += update.time < 1000 and update.time - 1 in index
    shares = [0, 0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(np.quantile(ages, shares), shares, atol=0.02)
    assert newest > 0


def test_updates_get_standard_normal_noise_which_sacs_target_and_actor_do_not_share(run):
    groups = [run.critics] if run.script is td3 else [run.critics, run.actor]
    noises = [np.vstack([update.noise.numpy() for update in updates]) for updates in groups]
    assert_standard_normal(np.hstack(noises))


def test_every_episode_has_a_start_of_its_own_and_every_evaluation_the_same(run):
    assert len(run.env.seeds) > 100 and len({*run.env.seeds} - {None}) == len(run.env.seeds)
    assert run.eval_env.seeds[-12:] == 4 * [run.args.seed + 100, None, None]


def test_evaluations_play_the_deterministic_policy_and_score_whole_episodes(run):
    first = len(run.eval_env.seeds) - 11  # 4 evaluations of 3 episodes, and maybe a trial before
    transitions = [t for t in run.eval_env.transitions if t[-1] >= first]
    obs, action, reward, *_, episode = map(np.array, zip(*transitions))
    obs, actor = torch.tensor(obs), run.agent.actor
    with torch.no_grad():
        pi = actor(obs) if run.script is td3 else actor.mean_and_log_std(obs)[0].tanh()
    np.testing.assert_allclose((action - [2.5, 2]) / [2.5, 5], pi, atol=1e-5)
    (file,) = Path(run.args.runs_dir).rglob("eval.csv")
    table = pd.read_csv(file)
    assert [*table.global_step] == [step for step in (0, 400, 800, 1200) for _ in range(3)]
    np.testing.assert_allclose(table["return"], np.bincount(episode, reward)[first:], rtol=1e-5)
    np.testing.assert_array_equal(table.length, np.bincount(episode)[first:])


def assert_adam(optimizers: dict, parts: dict) -> None:
    """There is one Adam for each of the parts, a name: (module or parameter, learning rate)."""
    assert optimizers.keys() == parts.keys()
    for name, (part, rate) in parts.items():
        parameters = [part] if isinstance(part, torch.Tensor) else [*part.parameters()]
        (group,) = optimizers[name].param_groups
        assert type(optimizers[name]) is torch.optim.Adam and group["lr"] == rate
        assert [*map(id, group["params"])] == [*map(id, parameters)]


def test_each_optimizer_has_its_own_parameters_and_learning_rate(run):
    agent = run.agent
    parts = {"actor": (agent.actor, 1e-12), "critic": (agent.critics, 2e-12)}
    parts |= {"alpha": (agent.log_alpha, 3e-12)} if run.script is sac else {}
    assert_adam(run.updates[0].optimizers, parts)


def returns_of(args, split: str, phase: str) -> np.ndarray:
    """What eval.csv has: (evaluations, goals)"""
    (file,) = Path(args.runs_dir).rglob("eval.csv")
    table = pd.read_csv(file).query("split == @split and phase == @phase")
    return np.array([*table.groupby("iteration")["return"].apply(list)])


TASKS, EPISODES, HORIZON = 3, 20, 10
MAML = dict(model="context", env_id="HalfCheetahVelMedium-v0", device="cpu", inner_lr=0.3)
MAML |= dict(num_train_goals=5, num_test_goals=2, meta_batch_size=TASKS, horizon=HORIZON)
MAML |= dict(episodes_per_goal=EPISODES, eval_episodes=4, num_iterations=4, eval_every=2)


@pytest.fixture(scope="module", params=[1, 2])
def maml_run(request, tmp_path_factory) -> SimpleNamespace:
    """A run with 1 or 2 inner steps; in place of an update the log_std becomes -1."""
    envs, batches, policies, folder = [], [], [], tmp_path_factory.mktemp("runs")
    args = maml.Args(num_adapt_steps=request.param, runs_dir=str(folder), **MAML)

    def update(policy, meta_batch, args):
        policies.append(policy)
        batches.append(meta_batch)
        policy.log_std.bias.data.fill_(-1)
        return {"kl": 0.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maml, "MetaVectorEnv", lambda *a: envs.append(PointMass(*a)) or envs[-1])
        patch.setattr(maml, "update", update)
        maml.train(args)
    size, policy = args.num_adapt_steps + 1, policies[0]
    train, test = (
        [env.rollouts[i : i + size] for i in range(0, len(env.rollouts), size)] for env in envs
    )
    return SimpleNamespace(args=args, policy=policy, batches=batches, train=train, test=test)


def test_mamls_goals_are_drawn_anew_for_each_iteration_without_replacement(maml_run):
    for rollouts in (*maml_run.train, *maml_run.test):
        assert all((rollout.goals == rollouts[0].goals).all() for rollout in rollouts)
    goals = np.array([rollouts[0].goals for rollouts in maml_run.train])
    assert len(goals) == 5  # the last ones only to be evaluated
    assert all(len({*drawn}) == TASKS for drawn in goals) and len(np.unique(goals, axis=0)) > 1
    assert len(np.unique(goals)) == 5 and 0 <= goals.min() and goals.max() <= 2.5
    (test_goals,) = {tuple(rollouts[0].goals) for rollouts in maml_run.test}
    assert len(test_goals) == 2 and all(2.5 <= goal <= 3 for goal in test_goals)


def by_task(arrays: list[np.ndarray]) -> np.ndarray:
    """The environments' steps (T * E, x) as batches have them: (T, E * H, x)"""
    return np.stack(arrays[:HORIZON], 1).reshape(TASKS, EPISODES * HORIZON, -1)


def test_mamls_inner_steps_learn_from_the_episodes_before_them_and_trpo_from_the_last(maml_run):
    for rollouts, (pre, _, post) in zip(maml_run.train, maml_run.batches):
        assert len(rollouts) == len(pre) + 1 == maml_run.args.num_adapt_steps + 1
        for rollout, batch in zip(rollouts, [*pre, post]):
            np.testing.assert_allclose(batch.context[:, 0], rollout.goals)
            np.testing.assert_allclose(batch.obs, by_task(rollout.obs), atol=1e-6)
            clipped = batch.action.clip(-1, 1)
            np.testing.assert_allclose(clipped, by_task(rollout.actions), atol=1e-6)
            shape = (TASKS, EPISODES, HORIZON, 1)
            obs, next_obs = (by_task(x).reshape(shape) for x in (rollout.obs, rollout.obs[1:]))
            for i, goal in enumerate(rollout.goals):
                episodes = obs[i], -((next_obs[i, ..., 0] - goal) ** 2), EPISODES * [HORIZON]
                expected = reference_maml.advantages(*episodes, gamma=0.95, lam=1.0)
                np.testing.assert_allclose(batch.advantage[i], expected, rtol=1e-3, atol=1e-3)
        assert (post.action.abs() > 1).any()  # as the policy chose them, before they are clipped


def test_mamls_actions_are_those_of_the_adapted_policies_with_independent_noise(maml_run):
    theta, noises = dict(maml_run.policy.named_parameters()), []
    for pre, _, post in maml_run.batches[1:]:  # from the second on log_std is -1
        for k, batch in enumerate([*pre, post]):
            for i in range(TASKS):
                *before, own = (type(b)(*(x[i : i + 1] for x in b)) for b in [*pre[:k], batch])
                theta_i = reference_maml.adapt(maml_run.policy, theta, before, maml_run.args)
                policy = reference_maml.distribution(maml_run.policy, theta_i, own)
                noises.append(((own.action - policy.mean) / policy.stddev).detach().numpy())
    noise = np.reshape(noises, (-1, TASKS, EPISODES, HORIZON))
    assert_standard_normal(noise.reshape(-1, 1))
    for axis in range(4):  # rollouts, tasks, episodes, steps
        rows = np.moveaxis(noise, axis, 0).reshape(noise.shape[axis], -1)
        assert abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 0.4


def test_mamls_starts_differ_from_rollout_to_rollout_but_not_between_evaluations(maml_run):
    train, test = (
        [[r.seed for r in rollouts] for rollouts in x] for x in (maml_run.train, maml_run.test)
    )
    assert len(np.unique(train)) == np.size(train)
    assert len(test) == 3 and test[0] == test[1] == test[2] and len({*test[0]}) == len(test[0])


def test_mamls_evaluation_scores_the_first_and_the_last_episodes(maml_run):
    for split, rollouts in (("train", maml_run.train[::2]), ("test", maml_run.test)):
        for phase, k in (("pre", 0), ("post", -1)):
            shape = (3, TASKS, EPISODES) if split == "train" else (3, 2, 4)
            expected = np.reshape([x[k].returns for x in rollouts], shape).mean(2)
            np.testing.assert_allclose(returns_of(maml_run.args, split, phase), expected)


GOALS, COLLECT, UPDATES, POSTERIOR = 4, 3, 10, 5.0
PEARL = dict(env_id="HalfCheetahVelMedium-v0", device="cpu", latent_dim=2, horizon=5)
PEARL |= dict(num_train_goals=GOALS, num_test_goals=2, num_collect_goals=COLLECT)
PEARL |= dict(num_initial_steps=10, num_prior_steps=10, num_posterior_steps=15, eval_every=3)
PEARL |= dict(num_train_steps=UPDATES, meta_batch_size=8, batch_size=30, context_batch_size=40)
PEARL |= dict(num_iterations=6, primary_widths=(8,), dynamic_width=8, eval_episodes=2)
PEARL |= dict(critic_lr=0.1, policy_lr=0.2, encoder_lr=0.3)


@pytest.fixture(scope="module")
def pearl_run(tmp_path_factory) -> SimpleNamespace:
    """A run without updates, and with an encoder whose z are nearly all 5."""
    envs, collections, calls, contexts, updates = [], [], [], [], []
    args = pearl.Args(runs_dir=str(tmp_path_factory.mktemp("runs")), **PEARL)

    def encoder(_, context):
        contexts.append(context)
        mean = torch.full((len(context), 2), POSTERIOR)
        return mean, torch.full_like(mean, 1e-4)

    def update(agent, optimizers, batch, z_noise, noise, args):
        time = len(collections)
        updates.append(SimpleNamespace(**locals()))
        return {"q_loss": torch.zeros(())}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pearl, "MetaVectorEnv", lambda *a: envs.append(PointMass(*a)) or envs[-1])
        patch.setattr(pearl, "update", update)
        patch.setattr(pearl.Encoder, "forward", encoder)
        watch(patch, pearl, "collect", collections)
        watch(patch, pearl, "rollout", calls)
        pearl.train(args)
    eval_env, env, all_env = envs
    rollouts = all_env.rollouts + env.rollouts + eval_env.rollouts  # collections, evaluations
    for one in envs:
        for rollout, call in zip(one.rollouts, [call for call in calls if call.envs is one]):
            rollout.z, rollout.policy = call.z, call.policy
    posterior = [call.posterior for call in collections] + 3 * [False, False, True]
    return SimpleNamespace(**locals())


def test_pearl_collects_in_all_tasks_once_and_then_in_random_ones_prior_first(pearl_run):
    first, *others = pearl_run.collections
    assert (first.chosen == range(GOALS)).all()
    kinds = [(call.num_steps, call.posterior) for call in pearl_run.collections]
    assert kinds == [(10, False)] + 6 * [(10, False), (15, True)]
    draws = [tuple(call.chosen) for call in others]
    assert draws[::2] == draws[1::2] and all(len(tasks) == COLLECT for tasks in draws)
    assert {task for tasks in draws for task in tasks} == {*range(GOALS)}
    assert any(len({*tasks}) < COLLECT for tasks in draws)  # with replacement
    goals = pearl_run.all_env.goals  # each task has its own for the whole run
    played = [rollout.goals for rollout in pearl_run.env.rollouts]
    np.testing.assert_array_equal(played, [goals[call.chosen] for call in others])
    assert len({*goals}) == GOALS and 0 <= goals.min() and goals.max() <= 2.5
    train, test = np.split(pearl_run.eval_env.goals, 2)
    assert (train == goals[:2]).all() and 2.5 <= test.min() and test.max() <= 3


def test_each_of_pearls_trajectories_has_its_z_from_the_prior_or_the_posterior(pearl_run):
    of_prior = []
    for rollout, posterior in zip(pearl_run.rollouts, pearl_run.posterior):
        assert len(rollout.z.unique(dim=0)) == len(rollout.z)
        assert posterior == ((rollout.z - POSTERIOR).abs() < 0.1).all()
        of_prior += [] if posterior else [rollout.z.numpy()]
    assert_standard_normal(np.vstack(of_prior))
    contexts = [context for context in pearl_run.contexts if len(context) > 1]  # to collect
    assert len(contexts) == 6  # a draw for each of the slots, once for whole trajectories
    assert all(len(context.unique(dim=0)) == len(context) == 9 for context in contexts)


def test_pearls_actions_are_the_policys_with_noise_and_its_means_in_evaluations(pearl_run):
    noises = []
    for rollout in pearl_run.rollouts:
        obs, action = (torch.tensor(np.stack(x, 1)) for x in (rollout.obs[:-1], rollout.actions))
        with torch.no_grad():
            generated = rollout.policy.generate(rollout.z)
            mean, log_std = rollout.policy.dynamic(generated, obs.float())
        noise = (action.atanh() - mean) / log_std.exp()
        noises.append(noise[torch.tensor(rollout.mask)].numpy())
    collections = np.vstack(noises[: len(pearl_run.collections)])  # (trajectories, steps, 1)
    assert_standard_normal(collections.reshape(-1, 1))
    assert_standard_normal(collections[..., 0])
    assert abs(np.vstack(noises[len(pearl_run.collections) :])).max() < 1e-3


def test_pearl_learns_from_all_transitions_and_infers_from_the_latest_of_the_prior(pearl_run):
    owner, latest, updates = {}, [set() for _ in range(GOALS)], iter(pearl_run.updates)
    batches = set()
    for number, (call, rollout) in enumerate(zip(pearl_run.collections, pearl_run.rollouts), 1):
        if not call.posterior:
            for task in call.chosen:
                latest[task] = set()
        slots, goals = rollout.mask, rollout.goals
        tasks, goals = (np.repeat(x, len(slots) // len(goals))[slots] for x in (call.chosen, goals))
        for obs, action, next_obs in zip(rollout.obs, rollout.actions, rollout.obs[1:]):
            reward = -((next_obs[slots, 0] - goals) ** 2)
            columns = obs[slots], action[slots], reward, next_obs[slots], 0 * reward  # goes on
            rows = np.column_stack(columns).astype(np.float32)
            owner |= dict(zip(map(tuple, rows), tasks))
            for task, row in zip(tasks, rows) if not call.posterior else ():
                latest[task].add(tuple(row[:3]))
        for update in itertools.islice(updates, UPDATES) if call.posterior else ():
            *columns, contexts = (x.numpy().reshape(8, -1, x.shape[-1]) for x in update.batch)
            columns = np.concatenate([x.reshape(8, 30, 1) for x in columns], -1)
            found = [{owner[tuple(row)] for row in rows} for rows in columns]
            assert update.time == number and all(len(tasks) == 1 for tasks in found)
            assert contexts.shape == (8, 40, 3)
            for (task,), context in zip(found, contexts):
                assert {*map(tuple, context)} <= latest[task]
            batches.add(tuple(task for (task,) in found))
    assert len(batches) == 6 * UPDATES and {*np.ravel([*batches])} == {*range(GOALS)}


def test_each_of_pearls_optimizers_has_its_own_parameters_and_learning_rate(pearl_run):
    agent = pearl_run.updates[0].agent
    parts = {"q": (agent.q, 0.1), "v": (agent.v, 0.1), "policy": (agent.policy, 0.2)}
    assert_adam(pearl_run.updates[0].optimizers, parts | {"encoder": (agent.encoder, 0.3)})


def test_pearls_updates_get_independent_standard_normal_noise(pearl_run):
    z_noise = np.stack([update.z_noise.numpy() for update in pearl_run.updates])
    noise = np.stack([update.noise.numpy() for update in pearl_run.updates])
    assert z_noise.shape == (6 * UPDATES, 8, 2) and noise.shape == (6 * UPDATES, 8, 30, 1)
    assert_standard_normal(z_noise.reshape(-1, 2))
    assert_standard_normal(noise.reshape(-1, 1))
    assert abs(np.corrcoef(noise.reshape(len(noise), -1)) - np.eye(len(noise))).max() < 0.4


def test_pearls_starts_differ_from_rollout_to_rollout_but_not_between_evaluations(pearl_run):
    seeds = [r.seed for env in (pearl_run.all_env, pearl_run.env) for r in env.rollouts]
    assert len({*seeds}) == len(seeds) == 13
    seeds = np.reshape([r.seed for r in pearl_run.eval_env.rollouts], (3, 3))
    assert (seeds == seeds[0]).all() and len({*seeds[0]}) == 3


def test_pearls_evaluation_scores_two_episodes_of_the_prior_and_one_of_the_posterior(pearl_run):
    returns = np.array([r.returns for r in pearl_run.eval_env.rollouts]).reshape(3, 3, 4, 2).mean(3)
    for split, goals in (("train", slice(0, 2)), ("test", slice(2, 4))):
        expected = returns[:, :2, goals].mean(1), returns[:, 2, goals]
        found = [returns_of(pearl_run.args, split, phase) for phase in ("pre", "post")]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
