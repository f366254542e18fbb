"""Speed of PEARL, as ratios measured side by side in one run.

    python analysis/speed_pearl.py            # two tables, 4 minutes on 2 cores
    python analysis/speed_pearl.py --memory   # peak memory at the paper's numbers

The first table interleaves, and takes medians of,
- the update of the script, 16 tasks of 256 transitions;
- the same update written plainly: z repeated for every transition before the networks, so that the
  hypernetwork generates the policy's weights for each of them, default Adam, a loop over parameters
  for the target, default matmul precision.

The second does so with the collection of data and the evaluation, in environment steps a second:
side by side, as in the script, and one trajectory at a time in a plain Gymnasium environment, with
the network called, as usual, on each state and latent.
"""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

import pearl_hyper  # noqa: E402
from meta_envs import HORIZON, MetaVectorEnv, sample_goals  # noqa: E402
from pearl_hyper import Agent, Batch, ReplayBuffer, infer, log_prob, make_optimizers  # noqa: E402


@dataclass
class Args:
    """Print the speed tables."""

    models: tuple[Literal["mlp", "hyper"], ...] = ("mlp", "hyper")
    """networks to measure"""
    rounds: int = 5
    """interleaved repetitions; medians are printed"""
    env_id: str = "HalfCheetahVel-v0"
    """family of tasks"""
    meta_batch_size: int = 16
    """tasks of an update"""
    batch_size: int = 256
    """transitions a task of an update"""
    memory: bool = False
    """measure peak memory instead: AntVel-v0, hyper, all the data of 400 iterations"""


def default_precision() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"


def plain_update(
    agent: Agent, optimizers: dict, batch: Batch, z_noise, noise, args: pearl_hyper.Args
) -> None:
    """PEARL's update as it is usually written: tasks times transitions as one batch of B."""
    z, kl = infer(agent, batch.context, z_noise)
    z = torch.cat([z_task.repeat(args.batch_size, 1) for z_task in z])  # (B, z)
    obs, action, reward, next_obs, terminated, noise = (
        x.flatten(0, 1) for x in (*batch[:5], noise)
    )
    if args.model == "hyper":  # meta (B, z), base (B, obs): one set of weights a transition
        mean, log_std = agent.policy.net(z.detach(), obs).chunk(2, -1)
    else:
        mean, log_std = agent.policy.net(torch.cat([obs, z.detach()], -1)).chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    u = mean + log_std.exp() * noise
    q1, q2 = (q(obs, action, z) for q in agent.q)
    v = agent.v(obs, z.detach())
    with torch.no_grad():
        next_value = agent.target_v(next_obs, z)
        target = args.reward_scale * reward + (1 - terminated) * args.gamma * next_value
    critic_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
    for name in ("q_optimizer", "encoder_optimizer"):
        optimizers[name].zero_grad()
    (critic_loss + args.kl_weight * kl).backward()
    for name in ("q_optimizer", "encoder_optimizer"):
        optimizers[name].step()
    for parameter in agent.q.parameters():
        parameter.requires_grad = False
    min_q = torch.min(*(q(obs, torch.tanh(u), z.detach()) for q in agent.q))
    for parameter in agent.q.parameters():
        parameter.requires_grad = True
    y = min_q - log_prob(u, noise, log_std)
    v_loss = F.mse_loss(v, y.detach())
    optimizers["v_optimizer"].zero_grad()
    v_loss.backward()
    optimizers["v_optimizer"].step()
    for t, p in zip(agent.target, agent.online):
        t.data.copy_((1 - args.tau) * t.data + args.tau * p.data)
    policy_loss = args.policy_reg * (mean.square().mean() + log_std.square().mean()) - y.mean()
    optimizers["policy_optimizer"].zero_grad()
    policy_loss.backward()
    optimizers["policy_optimizer"].step()


def seconds(rounds: int, **functions: Callable) -> dict[str, float]:
    """Median seconds of each function, called in turns, after one warm-up each."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            default_precision() if name == "plain" else pearl_hyper.fast_matmul()
            start = time.perf_counter()
            function()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def pearl_args(model: str, args: Args) -> pearl_hyper.Args:
    return pearl_hyper.Args(
        env_id=args.env_id,
        model=model,
        device="cpu",
        num_train_goals=100,
        meta_batch_size=args.meta_batch_size,
        batch_size=args.batch_size,
        context_batch_size=100,
        critic_lr=5e-5,
        policy_lr=1e-4,
    )


def dims(envs: MetaVectorEnv) -> tuple[int, int]:
    return envs.single_observation_space.shape[0], envs.single_action_space.shape[0]


def update_table(args: Args) -> None:
    obs_dim, action_dim = dims(MetaVectorEnv(args.env_id, [1.0], num_threads=1))
    T, N = args.meta_batch_size, args.batch_size
    print(f"\nOne update of {T} tasks x {N} transitions, sizes of {args.env_id}\n")
    print("| model | ms an update | plain | times the plain one |\n|---|---|---|---|", flush=True)
    for model in args.models:
        run_args = pearl_args(model, args)
        torch.manual_seed(0)
        obs, next_obs = torch.randn(2, T, N, obs_dim)
        action, reward = torch.rand(T, N, action_dim) * 2 - 1, torch.randn(T, N)
        context = torch.randn(T, run_args.context_batch_size, obs_dim + action_dim + 1)
        batch = Batch(obs, action, reward, next_obs, torch.zeros(T, N), context)
        noise = torch.randn(T, run_args.latent_dim), torch.randn(T, N, action_dim)
        own, plain = (Agent(obs_dim, action_dim, run_args) for _ in range(2))
        own_optimizers = make_optimizers(own, run_args)
        plain_optimizers = {
            name: torch.optim.Adam(optimizer.param_groups[0]["params"], lr=5e-5)
            for name, optimizer in make_optimizers(plain, run_args).items()
        }
        inputs = (batch, *noise, run_args)
        result = seconds(
            args.rounds,
            script=partial(pearl_hyper.update, own, own_optimizers, *inputs),
            plain=partial(plain_update, plain, plain_optimizers, *inputs),
        )
        script, plain = result["script"], result["plain"]
        row = (model, f"{1e3 * script:.0f}", f"{1e3 * plain:.0f}", f"{plain / script:.2f}")
        print("| " + " | ".join(row) + " |", flush=True)


@torch.no_grad()
def one_trajectory(agent: Agent, env: gym.Env, deterministic: bool) -> None:
    """z and the state go through the network at every step."""
    z = torch.randn(1, 5)
    obs, _ = env.reset()
    done = False
    while not done:
        policy = agent.policy
        obs = torch.as_tensor(obs, dtype=torch.float32).view(1, 1, -1)
        mean, log_std = policy.dynamic(policy.generate(z), obs)
        u = mean if deterministic else mean + log_std.exp() * torch.randn_like(mean)
        obs, _, terminated, truncated, _ = env.step(torch.tanh(u).flatten().numpy())
        done = terminated or truncated


def make_buffers(
    tasks: int, obs_dim: int, action_dim: int, args: pearl_hyper.Args
) -> tuple[ReplayBuffer, ReplayBuffer]:
    """The replay buffer and that of the encoder, as in the script."""
    widths = (obs_dim, action_dim, 1, obs_dim, 1), (obs_dim + action_dim + 1,)
    return tuple(ReplayBuffer(tasks, w, args.buffer_size, "cpu") for w in widths)


def collect(agent: Agent, envs: MetaVectorEnv, steps: dict, args: pearl_hyper.Args) -> None:
    """`steps` (with z from the posterior or not: number a task) into empty buffers."""
    goals = envs.goals
    buffers = make_buffers(len(goals), *dims(envs), args)
    rng, tasks = np.random.default_rng(0), np.arange(len(goals))
    for posterior, number in steps.items():
        pearl_hyper.collect(agent, envs, tasks, number, posterior, *buffers, goals, rng, args)


def collection_table(args: Args) -> None:
    threads = torch.get_num_threads()
    print(f"\nEnvironment steps a second in {args.env_id}, {threads} threads\n")
    print(
        "| model | what | side by side | one trajectory at a time | times |\n|---|---|---|---|---|"
    )
    goals = sample_goals(args.env_id, 100, np.random.default_rng(0))
    initial_envs = MetaVectorEnv(args.env_id, goals, 10, threads)
    envs = MetaVectorEnv(args.env_id, goals[:5], 3, threads)
    eval_envs = MetaVectorEnv(args.env_id, goals[:60], 1, threads)
    env = gym.make(args.env_id, goal=goals[0])
    env.reset(seed=0)
    for model in args.models:
        run_args = pearl_args(model, args)
        agent = Agent(*dims(envs), run_args)
        first, iteration = {False: 2000}, {False: 400, True: 600}
        for what, steps, side_by_side in (
            ("initial data", 200_000, partial(collect, agent, initial_envs, first, run_args)),
            ("an iteration's data", 5_000, partial(collect, agent, envs, iteration, run_args)),
            ("evaluation", 36_000, partial(pearl_hyper.evaluate, agent, eval_envs, run_args)),
        ):
            alone = partial(one_trajectory, agent, env, what == "evaluation")
            result = seconds(args.rounds, script=side_by_side, plain=alone)
            own, plain = steps / result["script"], HORIZON / result["plain"]
            row = (model, what, f"{own:.0f}", f"{plain:.0f}", f"{own / plain:.1f}")
            print("| " + " | ".join(row) + " |", flush=True)


def peak_memory(args: Args) -> None:
    """The end of a run of the paper, without its simulations: full buffers, an update, a checkpoint
    saved and loaded."""
    run_args = pearl_args("hyper", args)
    obs_dim, action_dim = dims(MetaVectorEnv("AntVel-v0", [1.0], num_threads=1))
    agent = Agent(obs_dim, action_dim, run_args)
    optimizers = make_optimizers(agent, run_args)
    buffer, encoder_buffer = make_buffers(100, obs_dim, action_dim, run_args)
    trajectory = torch.randn(HORIZON, 2 * obs_dim + action_dim + 2)
    transitions = 100 * 2000 + 400 * 5 * 1000
    for i in range(transitions // HORIZON):
        buffer.add(i % 100, trajectory)
    for i in range(10 * 100):
        encoder_buffer.add(i % 100, trajectory[:, : obs_dim + action_dim + 1])
    rng, goals = np.random.default_rng(0), np.ones(100)
    batch = pearl_hyper.sample_batch(buffer, encoder_buffer, goals, rng, run_args)
    noise = torch.randn(args.meta_batch_size, 5), torch.randn_like(batch.action)
    pearl_hyper.fast_matmul()
    pearl_hyper.update(agent, optimizers, batch, *noise, run_args)
    parts = {"agent": agent, "buffer": buffer, "encoder_buffer": encoder_buffer, **optimizers}
    with tempfile.TemporaryDirectory() as folder:
        states = {name: part.state_dict() for name, part in parts.items()}
        pearl_hyper.save_checkpoint(Path(folder), states)
        del states
        size = Path(folder, "checkpoint.pt").stat().st_size / 1024**3
        pearl_hyper.load_checkpoint(Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"{transitions} transitions of AntVel-v0: peak {peak:.2f} GiB, checkpoint {size:.2f} GiB")


def main(args: Args) -> None:
    if args.memory:
        return peak_memory(args)
    update_table(args)
    collection_table(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
