"""PEARL: its updates, what is collected and scored, learning."""

import copy
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference_pearl
import torch
from helpers import PEARL, ROOT, assert_close_in_bfloat16, assert_refused, assert_same_weights
from toy_envs import PointMass

import meta_envs
import pearl_hyper as pearl
from meta_envs import Family

SCRIPT = ROOT / "pearl_hyper.py"
SMALL = [*PEARL, "--env-id", "HalfCheetahVel-v0", "--num-iterations", 3]
OBS, ACTION, T, N, M = 4, 2, 3, 5, 7
GOALS = np.array([-1.0, 0.5, 2.0])
MODELS = pytest.mark.parametrize("model", ["mlp", "hyper"])


def make_agent(obs_dim=OBS, action_dim=ACTION, **options) -> tuple[pearl.Agent, pearl.Args]:
    torch.manual_seed(0)
    small = dict(device="cpu", primary_widths=(8, 16), dynamic_width=8, horizon=20)
    small |= dict(num_train_goals=T, meta_batch_size=T, batch_size=N, context_batch_size=M)
    args = pearl.Args(**(small | dict(critic_lr=1e-3, policy_lr=1e-3) | options))
    agent = pearl.Agent(obs_dim, action_dim, args)
    for module in agent.modules():  # last layers that start at nearly nothing hide mistakes
        if isinstance(module, torch.nn.Linear) and module.weight.std() < 0.01:
            torch.nn.init.normal_(module.weight, std=0.1)
    return agent, args


def make_batch(args: pearl.Args, seed: int = 1) -> tuple:
    """A batch, and the noise of z and of the actions."""
    torch.manual_seed(seed)
    obs, next_obs = torch.randn(2, T, N, OBS)
    action = torch.rand(T, N, ACTION) * 2 - 1
    terminated = (torch.rand(T, N) < 0.3).float()
    context = torch.randn(T, 1) if args.context == "oracle" else torch.randn(T, M, OBS + ACTION + 1)
    batch = pearl.Batch(obs, action, torch.randn(T, N), next_obs, terminated, context)
    return batch, torch.randn(T, args.latent_dim), torch.randn(T, N, ACTION)


def make_collecting(**options):
    """The tasks of GOALS, and collect() of them by a small agent for a `PointMass`."""
    agent, args = make_agent(1, 1, **options)
    buffers = (pearl.ReplayBuffer(3, w, args.buffer_size, "cpu") for w in ((1,) * 5, (3,)))
    tasks, rng = pearl.Tasks(GOALS, *buffers), np.random.default_rng(0)

    def run(envs, chosen, num_steps, posterior):
        pearl.collect(agent, envs, tasks, chosen, num_steps, rng, args, posterior=posterior)

    return args, tasks, run


def test_the_policys_log_std_is_bounded():
    agent, args = make_agent()
    task = agent.policy.generate(torch.randn(T, args.latent_dim))
    _, log_std = agent.policy.dynamic(task, 1e6 * torch.randn(T, N, OBS))
    assert log_std.min() == -20 and log_std.max() == 2


@MODELS
@pytest.mark.parametrize("context", ["learned", "oracle"])
def test_updates_are_those_of_the_paper(model, context):
    options = dict(gamma=0.9, tau=0.3, kl_weight=0.3, policy_reg=0.01, reward_scale=3.0)
    agent, args = make_agent(model=model, context=context, **options)
    before, batches = copy.deepcopy(agent), [make_batch(args, seed) for seed in range(4)]
    expected = reference_pearl.pearl(agent, batches, 0.01, args)
    names = pearl.make_optimizers(agent, args)
    optimizers = {n: torch.optim.SGD(getattr(agent, n).parameters(), 0.01) for n in names}
    for batch, z_noise, noise in batches:
        pearl.update(agent, optimizers, batch, z_noise, noise, args)
    assert_same_weights(agent, expected, before)


@MODELS
def test_bfloat16_has_the_losses_and_gradients_of_float32(model):
    agent, args = make_agent(model=model, primary_widths=(64, 128), dynamic_width=32)
    batch, z, noise = make_batch(args)

    def losses(precision: str):
        args.precision = precision  # the networks have the same Args
        policy_loss, y = pearl.policy_loss(agent, batch, z, noise, args)
        v_loss = pearl.v_loss(agent, batch, z, y)
        return pearl.q_loss(agent, batch, z, args), v_loss, policy_loss

    assert_close_in_bfloat16(losses, [agent.q, agent.v, agent.policy])


def test_the_oracle_knows_the_goal_of_the_rewards():
    args, tasks, run = make_collecting(context="oracle")
    run(PointMass("", GOALS, 2), np.arange(3), 40, posterior=False)
    batch = pearl.sample_batch(tasks, np.random.default_rng(0), args)
    assert batch.z_input.shape == (T, 1) and set(batch.z_input.flatten().tolist()) <= {*GOALS}
    reward = -(batch.next_obs.squeeze(-1) - batch.z_input).square()
    torch.testing.assert_close(batch.reward, reward, atol=1e-5, rtol=0)  # of the task of the goal


def test_buffer_samples_the_tasks_asked_for_and_keeps_the_last_transitions():
    buffer, rng = pearl.ReplayBuffer(2, (1, 2), capacity=10, device="cpu"), np.random.default_rng(0)
    for i in range(0, 14, 2):
        buffer.add(1, torch.arange(i, i + 2).float()[:, None].expand(-1, 3))
        buffer.add(0, torch.full((1, 3), -1.0))
    a, b = buffer.sample(np.array([1, 0, 1]), 200, rng)
    assert a.shape == (3, 200, 1) and b.shape == (3, 200, 2) and (a == b).all()
    assert (a[1] == -1).all() and set(a[0].flatten().tolist()) == {*range(4, 14)}
    buffer.clear(0)
    buffer.add(0, torch.full((1, 3), -2.0))
    assert (buffer.sample(np.array([0]), 50, rng)[0] == -2).all()


def test_trajectories_that_end_early_are_whole_and_others_follow_them():
    _, tasks, run = make_collecting()
    envs = PointMass("", GOALS, 2, edge=0.5)
    run(envs, np.arange(3), 40, posterior=False)
    steps = sum(rollout.lengths[rollout.mask].sum() for rollout in envs.rollouts)
    assert sum(tasks.buffer.added) == steps and len(envs.rollouts) > 1
    for task in range(3):
        assert 40 <= tasks.buffer.added[task] < 60
        obs, _, _, next_obs, terminated = tasks.buffer.data[task][: tasks.buffer.added[task]].T
        assert terminated.any() and (obs.abs() < 0.5).all()
        assert ((next_obs.abs() >= 0.5) == terminated.bool()).all()
        assert (obs[1:] != next_obs[:-1])[terminated[:-1].bool()].all()


def test_evaluation_takes_the_whole_context_wherever_trajectories_end():
    agent, args = make_agent(1, 1)
    agent.policy.dynamic = lambda _, obs: (0.5 * obs, obs * 0)
    envs, shapes = PointMass("", [0.5, 2.0], 2, edge=0.3), []
    agent.encoder.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    pearl.evaluate(agent, envs, args)
    lengths = envs.rollouts[0].lengths + envs.rollouts[1].lengths
    assert shapes == [(1, length, 3) for length in lengths] and np.ptp(lengths) > 0


def test_the_defaults_are_those_of_the_family_and_of_the_model_unless_given():
    mlp, hyper = pearl.Args(model="mlp", policy_lr=0.5), pearl.Args(env_id="AntFwdBack-v0")
    assert (mlp.critic_lr, mlp.policy_lr) == (3e-4, 0.5)
    assert (hyper.critic_lr, hyper.policy_lr) == (5e-5, 1e-4)
    assert (mlp.num_train_goals, mlp.meta_batch_size) == (100, 16)
    assert (hyper.num_train_goals, hyper.meta_batch_size) == (2, 4)


def test_non_finite_losses_and_rewards_stop_the_run(run_main):
    finished = run_main(SCRIPT, *SMALL, "--reward-scale", 1e18, "--critic-lr", 1e18)
    assert_refused(finished, "kl is not finite at iteration 0", code=1)
    agent, args = make_agent(1, 1)
    with pytest.raises(SystemExit, match="1"):
        pearl.evaluate(agent, PointMass("", [0.5, math.nan], 1), args)


def test_pearl_finds_the_goal_after_adaptation(run_main, monkeypatch):
    """A point mass that does not know whether the goal is at -1 or +1 returns at most -20."""
    family = Family("point", (-1.0, 1.0), (-1.0, 1.0), False, 0.0, 0.0)
    monkeypatch.setitem(meta_envs.FAMILIES, "HalfCheetahVel-v0", family)
    monkeypatch.setattr(meta_envs, "MetaVectorEnv", PointMass)
    args = """--num-train-goals 2 --horizon 20 --num-initial-steps 200 --num-collect-goals 4
    --num-prior-steps 40 --num-posterior-steps 40 --num-train-steps 100 --eval-episodes 8
    --meta-batch-size 4 --batch-size 32 --context-batch-size 40 --critic-lr 1e-3 --policy-lr 1e-3
    --encoder-lr 3e-3 --kl-weight 0.01 --reward-scale 10 --gamma 0.6 --tau 0.02 --latent-dim 2
    --primary-widths 32 64 --dynamic-width 64 --hyper-init bias --num-iterations"""
    finished = run_main(SCRIPT, *SMALL, *args.split(), 8)
    assert finished.code == 0, finished.err
    (file,) = Path("runs").rglob("eval.csv")
    table = pd.read_csv(file).query("split == 'test' and phase == 'post'")
    assert table.groupby("iteration")["return"].mean().max() > -12
