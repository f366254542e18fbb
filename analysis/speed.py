"""Speed of the updates, as ratios measured side by side in one run.

    python analysis/speed.py             # a table for TD3 and one for SAC, 10 minutes on 2 cores
    python analysis/speed.py --loop      # environment steps a second against CleanRL's structure
    python analysis/speed.py --memory    # peak memory of a full-size run with a full replay buffer

Every row interleaves three things and takes medians:
- the update of the script (two in a row; of TD3's two, one has the delayed part);
- the same update written plainly: default Adam, a loop over parameters for the targets, the
  critic frozen after the forward pass (as published), default matmul precision;
- the floor: the matrix products of the script's update alone, replayed into memory that is
  already there, and one pass over parameters, gradients and Adam's moments.
"""

import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import sac_hyper  # noqa: E402
import td3_hyper  # noqa: E402
from hypernet import CRITICS  # noqa: E402


@dataclass
class Args:
    """Print the speed tables."""

    critics: tuple[str, ...] = CRITICS
    """critics to measure"""
    batch_sizes: tuple[int, ...] = (100, 256)
    """batch sizes to measure"""
    rounds: int = 15
    """interleaved repetitions; medians are printed"""
    env_id: str = "Hopper-v4"
    """environment that gives the sizes of observation and action"""
    loop: bool = False
    """measure environment steps a second of the whole loop instead: mlp on HalfCheetah-v4"""
    memory: bool = False
    """measure peak memory instead: 1 million steps of Hopper-v4, nearly all of them random"""


def default_precision():
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"


class Products(TorchDispatchMode):
    """Records the matrix products of what runs inside, to run them again alone."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            product = torch.bmm if "bmm" in name else torch.mm
            a, b = (tensor.detach() for tensor in args[-2:])
            self.calls.append((product, a, b, torch.empty_like(out).detach()))
        return out

    @torch.no_grad()
    def replay(self):
        for product, a, b, out in self.calls:
            product(a, b, out=out)


def plain_td3_update(agent, optimizers, batch, noise, args, delayed):
    """TD3's update as it is usually written."""
    critic_optimizer, actor_optimizer = optimizers.values()
    obs, action, reward, next_obs, terminated = batch
    with torch.no_grad():
        epsilon = (noise * args.target_noise).clamp(-args.noise_clip, args.noise_clip)
        next_action = agent.target_actor(next_obs) + epsilon * agent.actor.half_width
        next_action = next_action.clamp(agent.actor.low, agent.actor.high)
        q1, q2 = (critic(next_obs, next_action) for critic in agent.target_critics)
        target = reward + (1 - terminated) * args.gamma * torch.min(q1, q2)
    critic_loss = sum(F.mse_loss(critic(obs, action), target) for critic in agent.critics)
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()
    if delayed:
        actor_loss = -agent.critics[0](obs, agent.actor(obs)).mean()
        actor_optimizer.zero_grad()
        for parameter in agent.critics.parameters():
            parameter.requires_grad = False
        actor_loss.backward()
        for parameter in agent.critics.parameters():
            parameter.requires_grad = True
        actor_optimizer.step()
        for online, target in (
            (agent.actor, agent.target_actor),
            (agent.critics, agent.target_critics),
        ):
            for p, t in zip(online.parameters(), target.parameters()):
                t.data.copy_(args.tau * p.data + (1 - args.tau) * t.data)


def plain_sac_update(agent, optimizers, batch, noise, args):
    """SAC's update as it is usually written."""
    obs, action, reward, next_obs, terminated = batch
    alpha = agent.log_alpha.exp().detach()
    with torch.no_grad():
        next_action, log_prob = agent.actor.sample(next_obs, noise[0])
        q1, q2 = (critic(next_obs, next_action) for critic in agent.target_critics)
        next_value = torch.min(q1, q2) - alpha * log_prob
        target = reward + (1 - terminated) * args.gamma * next_value
    critic_loss = sum(F.mse_loss(critic(obs, action), target) for critic in agent.critics)
    optimizers["critic_optimizer"].zero_grad()
    critic_loss.backward()
    optimizers["critic_optimizer"].step()
    new_action, log_prob = agent.actor.sample(obs, noise[1])
    q1, q2 = (critic(obs, new_action) for critic in agent.critics)
    actor_loss = (alpha * log_prob - torch.min(q1, q2)).mean()
    optimizers["actor_optimizer"].zero_grad()
    for parameter in agent.critics.parameters():
        parameter.requires_grad = False
    actor_loss.backward()
    for parameter in agent.critics.parameters():
        parameter.requires_grad = True
    optimizers["actor_optimizer"].step()
    alpha_loss = -(agent.log_alpha.exp() * (log_prob.detach() - action.shape[1])).mean()
    optimizers["alpha_optimizer"].zero_grad()
    alpha_loss.backward()
    optimizers["alpha_optimizer"].step()
    for p, t in zip(agent.critics.parameters(), agent.target_critics.parameters()):
        t.data.copy_(args.tau * p.data + (1 - args.tau) * t.data)


def seconds_an_update(script, plain_update, critic: str, batch_size: int, env, rounds: int) -> dict:
    """Median seconds of one update of a script (td3_hyper, sac_hyper): script, plain, floor."""
    args = script.Args(critic=critic, batch_size=batch_size)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    rng = np.random.default_rng(0)
    buffer = script.ReplayBuffer(obs_dim, action_dim, 10_000, "cpu")
    buffer.data.normal_()
    buffer.added = 10_000

    def prepare(update, **adam):
        torch.manual_seed(0)
        agent = script.Agent(obs_dim, env.action_space, args)
        optimizers = {
            "critic_optimizer": torch.optim.Adam(agent.critics.parameters(), lr=5e-5, **adam),
            "actor_optimizer": torch.optim.Adam(agent.actor.parameters(), lr=3e-4, **adam),
        }
        if script is sac_hyper:
            optimizers["alpha_optimizer"] = torch.optim.Adam([agent.log_alpha], lr=3e-4, **adam)

        def two_updates():
            for delayed in (False, True):
                batch = buffer.sample(batch_size, rng)
                shape = (2, batch_size, action_dim) if script is sac_hyper else batch[1].shape
                noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
                extra = () if script is sac_hyper else (delayed,)
                update(agent, optimizers, batch, noise, args, *extra)

        return two_updates, optimizers["critic_optimizer"]

    own, optimizer = prepare(script.update, fused=True)
    plain, _ = prepare(plain_update)
    script.fast_matmul()
    own()
    with Products() as products:
        own()

    def floor():
        products.replay()
        for _ in range(2):
            optimizer.step()

    times = {"script": [], "plain": [], "floor": []}
    for i in range(rounds + 2):
        for name, function in (("script", own), ("plain", plain), ("floor", floor)):
            default_precision() if name == "plain" else script.fast_matmul()
            start = time.perf_counter()
            function()
            if i >= 2:  # after warm-up
                times[name].append((time.perf_counter() - start) / 2)
    return {name: statistics.median(values) for name, values in times.items()}


def update_table(title: str, script, plain_update, args: Args) -> None:
    env = gym.make(args.env_id)
    print(f"\n{title}, sizes of {args.env_id}, {torch.get_num_threads()} threads, PyTorch", end=" ")
    print(f"{torch.__version__}\n")
    print(
        "| critic | batch | updates a second | ms an update | times the plain one | of the floor |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    for critic in args.critics:
        for batch_size in args.batch_sizes:
            seconds = seconds_an_update(script, plain_update, critic, batch_size, env, args.rounds)
            own, plain, floor = (seconds[name] for name in ("script", "plain", "floor"))
            row = (critic, batch_size, f"{1 / own:.1f}", f"{own * 1e3:.1f}")
            row += (f"{plain / own:.2f}", f"{own / floor:.2f}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


def cleanrl_loop(total_timesteps: int, env_id: str) -> None:
    """TD3 with mlp critics in the structure of CleanRL's td3_continuous_action.py."""
    args = td3_hyper.Args(critic="mlp")
    envs = gym.vector.SyncVectorEnv(
        [lambda: gym.wrappers.RecordEpisodeStatistics(gym.make(env_id))]
    )
    envs.single_observation_space.dtype = np.float32
    space = envs.single_action_space
    obs_dim, action_dim = envs.single_observation_space.shape[0], space.shape[0]
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    agent = td3_hyper.Agent(obs_dim, space, args)
    optimizers = {
        "critic_optimizer": torch.optim.Adam(agent.critics.parameters(), lr=3e-4),
        "actor_optimizer": torch.optim.Adam(agent.actor.parameters(), lr=3e-4),
    }
    capacity = args.buffer_size
    buffer = {
        "obs": np.zeros((capacity, 1, obs_dim), dtype=np.float32),
        "action": np.zeros((capacity, 1, action_dim), dtype=np.float32),
        "reward": np.zeros((capacity, 1), dtype=np.float32),
        "next_obs": np.zeros((capacity, 1, obs_dim), dtype=np.float32),
        "terminated": np.zeros((capacity, 1), dtype=np.float32),
    }
    obs, _ = envs.reset(seed=1)
    for step in range(total_timesteps):
        if step < args.learning_starts:
            actions = np.array([space.sample()])
        else:
            with torch.no_grad():
                actions = agent.actor(torch.Tensor(obs))
                actions += torch.normal(0, agent.actor.half_width * args.exploration_noise)
                actions = actions.numpy().clip(space.low, space.high)
        next_obs, rewards, terminations, truncations, _ = envs.step(actions)
        row = (obs, actions, rewards, next_obs, terminations)
        for name, value in zip(buffer, row):
            buffer[name][step] = value
        obs = next_obs
        if step >= args.learning_starts:
            index = rng.integers(step + 1, size=args.batch_size)
            batch = tuple(torch.as_tensor(array[index, 0]) for array in buffer.values())
            noise = torch.randn_like(batch[1])
            delayed = step % args.policy_frequency == 0
            plain_td3_update(agent, optimizers, batch, noise, args, delayed)


def script_loop(total_timesteps: int, env_id: str) -> None:
    """The real script, from its first line to its last, one evaluation episode and files included,
    which the other has not."""
    with tempfile.TemporaryDirectory() as runs_dir:
        sys.argv = ["td3_hyper.py", "--critic", "mlp", "--env-id", env_id, "--runs-dir", runs_dir]
        sys.argv += ["--total-timesteps", str(total_timesteps), "--eval-every", "1000000000"]
        sys.argv += ["--eval-episodes", "1"]
        runpy.run_path(str(ROOT / "td3_hyper.py"), run_name="__main__")


def loop_table(rounds: int, total_timesteps: int = 5_000, env_id: str = "HalfCheetah-v4") -> None:
    rates = {"script": [], "CleanRL's structure": []}
    script_loop(1_100, env_id)  # what is imported at first use
    for _ in range(rounds):
        for name, loop in zip(rates, (script_loop, cleanrl_loop)):
            if loop is cleanrl_loop:
                default_precision()
            start = time.perf_counter()
            loop(total_timesteps, env_id)
            rates[name].append(total_timesteps / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(*rates.values()))
    print(f"\n{total_timesteps} steps of {env_id}, mlp, {torch.get_num_threads()} threads\n")
    print("| | environment steps a second |\n|---|---|")
    for name, rate in medians.items():
        print(f"| {name} | {rate:.0f} |")
    print(f"| ratio | {ratio:.2f} |")


def peak_memory(total_timesteps: int = 1_000_000) -> None:
    """A run with sa-hyper that learns in its last 100 steps, with the buffer full, and saves."""
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [sys.executable, str(ROOT / "td3_hyper.py"), "--runs-dir", runs_dir]
        command += ["--total-timesteps", str(total_timesteps), "--eval-every", str(total_timesteps)]
        command += ["--learning-starts", str(total_timesteps - 100), "--checkpoint-every", "250000"]
        subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    print(f"peak memory of {total_timesteps} steps of Hopper-v4 with sa-hyper: {peak:.2f} GiB")


def main(args: Args) -> None:
    if args.memory:
        return peak_memory()
    gym.logger.min_level = gym.logger.ERROR
    if args.loop:
        return loop_table(rounds=min(args.rounds, 5))
    update_table("TD3", td3_hyper, plain_td3_update, args)
    update_table("SAC", sac_hyper, plain_sac_update, args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
