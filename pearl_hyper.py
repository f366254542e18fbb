"""PEARL (Rakelly et al., 2019) with MLPs or with the hypernetworks of the paper (Secs. 3 and 4).

An encoder turns transitions of a task, the context c, into a distribution of a latent z, q(z|c); a
soft actor-critic learns Q(s, a, z), V(s, z) and π(a|s, z) off-policy. With `--model hyper` the
state makes the weights of the critics, f_{w(s)}(a, z) and f_{w(s)}(z), and z those of the policy.

    python pearl_hyper.py --env-id HalfCheetahVelMedium-v0 --model hyper

In the help, (paper) marks a value from the paper and (released) one from the authors' code.
"""

import contextlib
import copy
import functools
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn
from zipfile import ZipFile

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # lets two runs share cores (results/speed.md)
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no clean-up, here or later

import filelock
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hypernet import CudaGraph, Float32Linear, HyperNetwork, tune
from meta_envs import FAMILIES, MetaVectorEnv, sample_goals


@dataclass
class Args:
    model: Literal["mlp", "hyper"] = "hyper"
    """policy and critics: MLPs with three layers of 300, or hypernetworks (paper, Sec. 4)"""
    context: Literal["learned", "oracle"] = "learned"
    """z: inferred by the encoder, or the goal itself (released, there scaled to [0, 1])"""
    primary_widths: tuple[int, ...] = (256, 512, 1024)
    """widths of the primary networks, for hyper (released)"""
    dynamic_width: int = 256
    """hidden units of the dynamic networks, for hyper (paper, Sec. 2)"""
    hyper_init: Literal["released", "paper", "bias"] = "released"
    """how the dynamic weights start, see init_heads in hypernet.py and results/choices.md"""
    latent_dim: int = 5
    """dimensions of the learned z (released)"""
    kl_weight: float = 0.1
    """weight of the KL divergence from the prior, a sum over tasks and dimensions (released)"""
    num_train_goals: int | None = None
    """tasks to train on, drawn once from the seed; None means the family's number (released)"""
    num_test_goals: int | None = None
    """test tasks to evaluate on, beside as many of the train tasks; None: family's (released)"""
    num_initial_steps: int = 2000
    """environment steps in each train task, z from the prior, before any training (released)"""
    num_collect_goals: int = 5
    """train tasks in which an iteration collects data, drawn with replacement (released)"""
    num_prior_steps: int | None = None
    """environment steps in each, z from the prior, whole trajectories; None: family's (released)"""
    num_posterior_steps: int | None = None
    """the same with z from the posterior; None: family's (released)"""
    num_train_steps: int | None = None
    """updates in an iteration; None: family's (released)"""
    meta_batch_size: int | None = None
    """train tasks in an update, drawn with replacement; None: family's (released)"""
    batch_size: int = 256
    """transitions of each task in an update (released)"""
    context_batch_size: int | None = None
    """transitions of a task that the encoder sees while training; None: family's (released)"""
    buffer_size: int = 1_000_000
    """transitions of each task that the replay buffer holds; it grows as they come (released)"""
    horizon: int = 200
    """environment steps of a trajectory (released)"""
    gamma: float = 0.99
    """discount factor (released)"""
    tau: float = 0.005
    """how far the target of V moves towards V at each update (released)"""
    reward_scale: float = 5.0
    """factor of the rewards in the target of Q; the temperature is 1 (released)"""
    policy_reg: float = 1e-3
    """weight of the mean squares of the policy's mean and log_std in its loss (released)"""
    critic_lr: float | None = None
    """Adam's learning rate for Q and V; None means 5e-5 for hyper, 3e-4 for mlp (released)"""
    policy_lr: float | None = None
    """Adam's learning rate for the policy; None means 1e-4 for hyper, 3e-4 for mlp (released)"""
    encoder_lr: float = 3e-4
    """Adam's learning rate for the encoder (released)"""

    env_id: Literal[tuple(FAMILIES)] = "HalfCheetahVelMedium-v0"
    """family of tasks (paper: {HalfCheetah,Ant}{FwdBack,Vel}-v0, HalfCheetahVelMedium-v0)"""
    seed: int = 1
    """seed of goals, network weights, environments, noise and batches (paper: 5 seeds)"""
    num_iterations: int = 400
    """collections of data, each with its updates; a larger number extends a run (released)"""
    eval_every: int = 1
    """iterations between two evaluations; there is one before any training and one at the end"""
    eval_episodes: int | None = None
    """scored trajectories per goal, each after two for its context; None: family's (released)"""
    checkpoint_every: int = 1
    """iterations between two checkpoints"""
    save_every: int = 0
    """iterations between two step_N.pt, the networks alone; 0 saves the last one only"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """arithmetic inside policy and critics; weights, losses and encoder are always float32"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where the networks and the replay buffers live"""
    cuda_graph: bool = False
    """on a GPU, record the update once and replay it, which saves launching its kernels"""
    runs_dir: str = "runs"
    """the run goes to RUNS_DIR/EXP_NAME/ENV_ID/MODEL/seedSEED, or MODEL-oracle with the oracle"""
    exp_name: str = "pearl_hyper"
    """name of the experiment, a part of the run directory"""
    track: bool = False
    """send the TensorBoard scalars to Weights & Biases too (needs: pip install wandb)"""

    def __post_init__(self):
        hyper = self.model == "hyper"
        rates = {"critic_lr": 5e-5 if hyper else 3e-4, "policy_lr": 1e-4 if hyper else 3e-4}
        defaults = VELOCITY | FAMILY_DEFAULTS.get(self.env_id, {}) | rates  # tables above train
        for name, default in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        check_args(
            self, from_0=("seed", "save_every", "num_posterior_steps"), to_1=("gamma", "tau")
        )
        if self.cuda_graph and not self.device.startswith("cuda"):
            raise ValueError("--cuda-graph needs --device cuda")


class MLP(nn.Module):
    """Linear layers with relu between them on the concatenation of the inputs.

    Hidden weights start uniform in ±1 / sqrt(fan_out), hidden biases at 0.1, the last layer uniform
    in ±output (released).
    """

    def __init__(self, *widths: int, output: float = 3e-3):
        super().__init__()
        layers, kinds = [], (len(widths) - 2) * [nn.Linear] + [Float32Linear]
        for kind, fan_in, fan_out in zip(kinds, widths, widths[1:]):
            linear = kind(fan_in, fan_out)
            nn.init.uniform_(linear.weight, -(fan_out**-0.5), fan_out**-0.5)
            nn.init.constant_(linear.bias, 0.1)
            layers += [linear, nn.ReLU()]
        nn.init.uniform_(linear.weight, -output, output)
        nn.init.uniform_(linear.bias, -output, output)
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layers(torch.cat(inputs, -1))


def autocast(x: Tensor, args: Args) -> torch.autocast:
    """Where the matrix products of policy and critics have the precision asked for."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bfloat16")


def make_net(meta_dim: int, base_dim: int, out_dim: int, args: Args, output: float) -> nn.Module:
    """Hypernetwork f_{w(meta)}(base), or MLP on both inputs, its last layer in ±output at first."""
    if args.model == "hyper":
        widths = dict(primary_widths=args.primary_widths, dynamic_width=args.dynamic_width)
        return HyperNetwork(meta_dim, base_dim, out_dim, init=args.hyper_init, **widths)
    return MLP(meta_dim + base_dim, 300, 300, 300, out_dim, output=output)


class Critic(nn.Module):
    """Q(s, a, z) or V(s, z), with base [a, z] or z: obs (T, N, obs), base (T, N, x) -> (T, N).

    With hyper, each state makes its own weights, whatever the task (paper, end of Sec. 3).
    """

    def __init__(self, obs_dim: int, base_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.net = make_net(obs_dim, base_dim, 1, args, output=3e-3)

    def forward(self, obs: Tensor, *base: Tensor) -> Tensor:
        with autocast(obs, self.args):
            return self.net(obs, torch.cat(base, -1)).squeeze(-1)


class Policy(nn.Module):
    """Tanh-Gaussian policies of T tasks: a = tanh(u), u ~ N(mean(s, z), std(s, z)²).

    The latent is the meta variable of hyper: the weights of a task's policy are generated once for
    all its states (paper, Sec. 4). The actions of all families are in [-1, 1].
    """

    def __init__(self, obs_dim: int, action_dim: int, latent_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.net = make_net(latent_dim, obs_dim, 2 * action_dim, args, output=1e-3)

    def generate(self, z: Tensor):
        """What is the same for all states of a task: dynamic weights, or z itself, (T, z)."""
        with autocast(z, self.args):
            return self.net.generate(z) if self.args.model == "hyper" else z

    def dynamic(self, generated, obs: Tensor) -> tuple[Tensor, Tensor]:
        """mean, log_std (T, N, action) at obs (T, N, obs), with what `generate` returns."""
        with autocast(obs, self.args):
            if self.args.model == "hyper":
                output = self.net.dynamic(generated, obs)
            else:
                z = generated.unsqueeze(1).expand(-1, obs.shape[1], -1)
                output = self.net(obs, z)
        mean, log_std = output.chunk(2, -1)
        return mean, log_std.clamp(-20, 2)


def log_prob(u: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
    """log π(a) of a = tanh(u), u = mean + std ε: (T, N, action) -> (T, N)

    log π(a) = log N(u; mean, std²) - Σ log(1 - tanh²(u)), where
    log(1 - tanh²(u)) = 2 (log 2 - u - softplus(-2u)) stays exact near the bounds.
    """
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return (log_normal - log_slope).sum(-1)


def product_of_gaussians(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (T, z) of the normalised product of each task's N factors (T, N, z)."""
    precision = 1 / variance
    variance = 1 / precision.sum(1)
    return variance * (precision * mean).sum(1), variance


class Encoder(nn.Module):
    """q(z|c) = Π_n N(z; f(s_n, a_n, r_n)): context (T, N, obs + action + 1) -> mean, variance."""

    def __init__(self, obs_dim: int, action_dim: int, latent_dim: int):
        super().__init__()
        self.net = MLP(obs_dim + action_dim + 1, 200, 200, 200, 2 * latent_dim)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self.net(context).chunk(2, -1)
        return product_of_gaussians(mean, F.softplus(variance).clamp(min=1e-7))


def kl_from_prior(mean: Tensor, variance: Tensor) -> Tensor:
    """KL(N(mean, variance) ‖ N(0, 1)), summed over dimensions and tasks (released)."""
    return 0.5 * (variance + mean.square() - 1 - variance.log()).sum()


class Agent(nn.Module):
    """Policy, twin Q, V with its target, and the encoder, which is None with the oracle."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        oracle = args.context == "oracle"
        latent_dim = 1 if oracle else args.latent_dim
        self.policy = Policy(obs_dim, action_dim, latent_dim, args)
        self.q = nn.ModuleList(Critic(obs_dim, action_dim + latent_dim, args) for _ in range(2))
        self.v = Critic(obs_dim, latent_dim, args)
        self.target_v = copy.deepcopy(self.v).requires_grad_(False)
        self.encoder = None if oracle else Encoder(obs_dim, action_dim, latent_dim)
        self.online, self.target = [*self.v.parameters()], [*self.target_v.parameters()]  # θ, θ'


def make_optimizers(agent: Agent, args: Args) -> dict[str, torch.optim.Optimizer]:
    rates = {"q": args.critic_lr, "v": args.critic_lr, "policy": args.policy_lr}
    rates |= {"encoder": args.encoder_lr} if agent.encoder else {}
    adam = functools.partial(torch.optim.Adam, fused=True, capturable=args.cuda_graph)
    return {name: adam(getattr(agent, name).parameters(), lr) for name, lr in rates.items()}


class Batch(NamedTuple):
    """N transitions of each of T tasks, and what z comes from."""

    obs: Tensor  # (T, N, obs)
    action: Tensor  # (T, N, action)
    reward: Tensor  # (T, N)
    next_obs: Tensor  # (T, N, obs)
    terminated: Tensor  # (T, N)
    z_input: Tensor  # the context (T, M, obs + action + 1), or with the oracle the goals (T, 1)


def infer(agent: Agent, z_input: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """z ~ q(z|c) of `noise` (T, z), reparameterised, and the KL; goals and 0 with the oracle."""
    if agent.encoder is None:
        return z_input, z_input.new_zeros(())
    mean, variance = agent.encoder(z_input)
    return mean + variance.sqrt() * noise, kl_from_prior(mean, variance)


def q_loss(agent: Agent, batch: Batch, z: Tensor, args: Args) -> Tensor:
    """Σ_i mean (Q_i(s, a, z) - y)² with y = reward_scale r + γ (1 - terminated) V'(s', z).

    The encoder learns through z here, and not through the target.
    """
    z = z.unsqueeze(1).expand(-1, batch.obs.shape[1], -1)  # (T, N, z)
    with torch.no_grad():
        next_value = agent.target_v(batch.next_obs, z)
        target = args.reward_scale * batch.reward + args.gamma * (1 - batch.terminated) * next_value
    return sum(F.mse_loss(q(batch.obs, batch.action, z), target) for q in agent.q)


def policy_loss(
    agent: Agent, batch: Batch, z: Tensor, noise: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """-mean(y) plus `policy_reg` times the mean squares of the policy's mean and log_std, and y.

    y (T, N) = min_i Q_i(s, a, z) - log π(a|s, z), detached, where `noise` (T, N, action) draws a.
    z is a constant here. Q is frozen during its forward pass, which is when autograd records what
    to differentiate, so that its primary networks cost no backward pass.
    """
    obs, z = batch.obs, z.detach()
    mean, log_std = agent.policy.dynamic(agent.policy.generate(z), obs)
    u = mean + log_std.exp() * noise
    z = z.unsqueeze(1).expand(-1, obs.shape[1], -1)  # (T, N, z)
    agent.q.requires_grad_(False)
    q1, q2 = (q(obs, torch.tanh(u), z) for q in agent.q)
    agent.q.requires_grad_(True)
    y = torch.min(q1, q2) - log_prob(u, noise, log_std)
    regularisation = mean.square().mean() + log_std.square().mean()
    return args.policy_reg * regularisation - y.mean(), y.detach()


def v_loss(agent: Agent, batch: Batch, z: Tensor, y: Tensor) -> Tensor:
    """mean (V(s, z) - y)² with the y of `policy_loss`; z is a constant here."""
    z = z.detach().unsqueeze(1).expand(-1, batch.obs.shape[1], -1)  # (T, N, z)
    return F.mse_loss(agent.v(batch.obs, z), y)


def update(
    agent: Agent, optimizers: dict, batch: Batch, z_noise: Tensor, noise: Tensor, args: Args
) -> dict[str, Tensor]:
    """Updates Q and the encoder, then V and the policy, then the target of V. Returns the losses.

    `z_noise` (T, z) and `noise` (T, N, action) are standard normal.
    """
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    z, kl = infer(agent, batch.z_input, z_noise)
    losses = {"kl": kl, "q_loss": q_loss(agent, batch, z, args)}
    (losses["q_loss"] + args.kl_weight * kl).backward()
    optimizers["q"].step()
    if agent.encoder:
        optimizers["encoder"].step()
    losses["policy_loss"], y = policy_loss(agent, batch, z, noise, args)
    losses["v_loss"] = v_loss(agent, batch, z, y)
    # The two have no parameter in common, so that one backward pass of the sum does for both
    (losses["v_loss"] + losses["policy_loss"]).backward()
    optimizers["v"].step()
    optimizers["policy"].step()
    move_towards = torch.optim.swa_utils.get_ema_multi_avg_fn(decay=1 - args.tau)
    move_towards(agent.target, agent.online, None)  # θ' <- θ' + τ (θ - θ')
    return {name: loss.detach() for name, loss in losses.items()}


class ReplayBuffer:
    """The last `capacity` transitions of each task, one per row; memory grows as they come."""

    def __init__(self, num_tasks: int, widths: tuple[int, ...], capacity: int, device: str):
        self.widths, self.capacity = widths, capacity
        self.data = [torch.empty(0, sum(widths), device=device) for _ in range(num_tasks)]
        self.added = [0] * num_tasks

    def add(self, task: int, rows: Tensor) -> None:
        """Stores transitions (N, row) of a task."""
        data, added = self.data[task], self.added[task]
        if len(data) < min(added + len(rows), self.capacity):
            size = min(2 * (added + len(rows)), self.capacity)
            self.data[task] = data.new_empty(size, data.shape[1])
            self.data[task][: len(data)] = data
        index = torch.arange(added, added + len(rows), device=data.device)[-self.capacity :]
        self.data[task][index % self.capacity] = rows[-self.capacity :].to(data.device)
        self.added[task] += len(rows)

    def clear(self, task: int) -> None:
        self.added[task] = 0

    def sample(self, tasks: np.ndarray, num: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """N = `num` transitions of each of `tasks` (T,), with replacement: (T, N, width) each"""
        filled = [min(self.added[task], self.capacity) for task in tasks]
        index = rng.integers(np.array(filled)[:, None], size=(len(tasks), num))
        index = torch.from_numpy(index).to(self.data[0].device)
        rows = torch.stack([self.data[task][i] for task, i in zip(tasks, index)])
        return rows.split(self.widths, -1)

    def state_dict(self) -> dict:
        filled = [data[:added].clone() for data, added in zip(self.data, self.added)]
        return {"data": filled, "added": list(self.added)}

    def load_state_dict(self, state: dict) -> None:
        self.data = [data.to(self.data[0].device) for data in state["data"]]
        self.added = list(state["added"])


class Tasks(NamedTuple):
    """The train tasks, and what has been collected in them."""

    goals: np.ndarray  # (num_train_goals,)
    buffer: ReplayBuffer  # all transitions: obs, action, reward, next_obs, terminated
    encoder_buffer: ReplayBuffer  # obs, action, reward of the latest ones with z from the prior


def sample_batch(tasks: Tasks, rng: np.random.Generator, args: Args) -> Batch:
    """Transitions of random train tasks, and a context from their latest collection, or goals."""
    chosen = rng.integers(args.num_train_goals, size=args.meta_batch_size)
    obs, action, reward, next_obs, terminated = tasks.buffer.sample(chosen, args.batch_size, rng)
    if args.context == "learned":
        (z_input,) = tasks.encoder_buffer.sample(chosen, args.context_batch_size, rng)
    else:
        z_input = goal_tensor(tasks.goals[chosen], args)
    return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1), z_input)


def normal(rng: np.random.Generator, *shape: int, device: str) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device)


def goal_tensor(goals: np.ndarray, args: Args) -> Tensor:
    """goals (T,) as the oracle's z (T, 1)"""
    return torch.as_tensor(goals[:, None], dtype=torch.float32, device=args.device)


@torch.no_grad()
def sample_z(
    agent: Agent, goals: np.ndarray, context: Tensor | None, rng: np.random.Generator, args: Args
) -> Tensor:
    """z (T, z) of T trajectories: from the prior, or from the posterior if there is a context."""
    if args.context == "oracle":
        return goal_tensor(goals, args)
    z = normal(rng, len(goals), args.latent_dim, device=args.device)
    if context is not None:
        z, _ = infer(agent, context, z)
    return z


@torch.no_grad()
def rollout(
    policy: Policy,
    z: Tensor,
    envs: MetaVectorEnv,
    slots: np.ndarray,
    rng: np.random.Generator,
    deterministic: bool = False,
) -> list[Tensor]:
    """Plays a trajectory in each slot that the mask `slots` (S,) selects, with z (S, z).

    Returns the transitions (steps, row) of each slot, none of those that are not selected.
    """
    generated = policy.generate(z)  # once for the whole trajectory
    obs, _ = envs.reset(seed=int(rng.integers(2**31)), options={"reset_mask": slots})
    # For the whole horizon, (H, T, 1, action): the draws after it are the same for any policy
    noise = normal(rng, envs.horizon, len(z), 1, *envs.single_action_space.shape, device=z.device)
    done, rows, alive = ~slots, [], []
    while not done.all():
        mean, log_std = policy.dynamic(generated, torch.as_tensor(obs).to(z).unsqueeze(1))
        u = mean if deterministic else mean + log_std.exp() * noise[len(rows)]
        action = torch.tanh(u).squeeze(1).cpu().numpy()  # (T, action)
        next_obs, reward, terminated, truncated, _ = envs.step(action)
        row = (obs, action, reward[:, None], next_obs, terminated[:, None])
        rows.append(np.concatenate(row, 1, dtype=np.float32))
        alive.append(~done)
        obs, done = next_obs, done | terminated | truncated
    transitions, alive = np.stack(rows, 1), np.stack(alive, 1)  # (S, H, row), (S, H)
    for i in np.flatnonzero(~np.isfinite(transitions).all((1, 2))):
        goal = envs.goals[i // envs.episodes_per_goal]
        stop(f"goal {goal:g}: an observation, an action or a reward is not finite", code=1)
    return [torch.from_numpy(slot[mask]) for slot, mask in zip(transitions, alive)]


def collect(
    agent: Agent,
    envs: MetaVectorEnv,
    tasks: Tasks,
    chosen: np.ndarray,
    num_steps: int,
    rng: np.random.Generator,
    args: Args,
    *,
    posterior: bool,
) -> None:
    """Adds whole trajectories, at least `num_steps` in each of the tasks with these indices (T,).

    Each trajectory has its own z, from the prior, or from the posterior of transitions drawn anew.
    Only those from the prior enter the encoder's buffer: no z depends on another trajectory, and
    all run side by side. More follow if early ends leave steps missing.
    """
    envs.set_goals(tasks.goals[chosen])
    slot_tasks = np.repeat(chosen, envs.episodes_per_goal)
    context_width = sum(tasks.encoder_buffer.widths)  # obs, action, reward
    steps = np.zeros(len(chosen), dtype=int)
    while (steps < num_steps).any():
        missing = np.ceil((num_steps - steps) / args.horizon)  # trajectories, if they are long
        slots = (np.arange(envs.episodes_per_goal) < missing[:, None]).reshape(-1)
        context = None
        if posterior and args.context == "learned":
            (context,) = tasks.encoder_buffer.sample(slot_tasks, args.context_batch_size, rng)
        z = sample_z(agent, tasks.goals[slot_tasks], context, rng, args)
        trajectories = rollout(agent.policy, z, envs, slots, rng)
        for task, trajectory in zip(slot_tasks, trajectories):
            tasks.buffer.add(task, trajectory)
            if not posterior and args.context == "learned":
                tasks.encoder_buffer.add(task, trajectory[:, :context_width])
        steps += np.reshape([*map(len, trajectories)], (len(chosen), -1)).sum(1)


def evaluate(agent: Agent, envs: MetaVectorEnv, args: Args) -> dict[str, np.ndarray]:
    """Mean return of each goal with z from the prior, and then from the posterior.

    {"pre": (T,), "post": (T,)}. The policy is deterministic. Two trajectories with z from the prior
    gather the context (released), only the third is scored as "post"; the oracle has nothing to
    gather and no "pre". The starts and the noise are always the same.
    """
    rng = np.random.default_rng(args.seed + 100)
    goals = np.repeat(envs.goals, envs.episodes_per_goal)
    slots = np.ones(len(goals), dtype=bool)
    context_width = sum((*envs.single_observation_space.shape, *envs.single_action_space.shape, 1))

    def play(z: Tensor) -> list[Tensor]:
        return rollout(agent.policy, z, envs, slots, rng, deterministic=True)

    def mean_returns(trajectories: list[Tensor]) -> np.ndarray:
        returns = [x[:, context_width - 1].double().numpy().sum() for x in trajectories]
        return np.reshape(returns, (-1, envs.episodes_per_goal)).mean(1)

    results, z = {}, sample_z(agent, goals, None, rng, args)
    if args.context == "learned":
        first, second = play(z), play(sample_z(agent, goals, None, rng, args))
        results["pre"] = (mean_returns(first) + mean_returns(second)) / 2
        z = []
        for i in range(len(goals)):  # one by one, as early ends leave shorter contexts
            context = torch.cat([first[i], second[i]])[:, :context_width]
            z.append(sample_z(agent, goals[i : i + 1], context[None].to(args.device), rng, args))
        z = torch.cat(z)
    results["post"] = mean_returns(play(z))
    return results


VELOCITY = dict(num_train_goals=100, num_test_goals=30, meta_batch_size=16, context_batch_size=100,
                num_prior_steps=400, num_posterior_steps=600, num_train_steps=2000,
                eval_episodes=1)  # fmt: skip
FWD_BACK = dict(num_train_goals=2, num_test_goals=2, meta_batch_size=4, context_batch_size=256)
FAMILY_DEFAULTS = {  # where they differ from VELOCITY (released)
    "HalfCheetahFwdBack-v0": FWD_BACK | dict(num_prior_steps=1000, num_posterior_steps=1000,
                                             eval_episodes=4),
    "AntFwdBack-v0": FWD_BACK | dict(num_train_steps=4000, eval_episodes=2),
}  # fmt: skip


def make_envs(args: Args, goals: np.ndarray, episodes: int) -> MetaVectorEnv:
    return MetaVectorEnv(args.env_id, goals, episodes, torch.get_num_threads(), args.horizon)


def train(args: Args) -> None:
    model = args.model if args.context == "learned" else f"{args.model}-oracle"
    run = Run(args, model, args.num_iterations, "iteration,env_steps,split,goal,phase,return")
    torch.manual_seed(args.seed)  # initial weights
    rng = np.random.default_rng(args.seed)  # goals, environments, actions, latents, batches
    train_goals = sample_goals(args.env_id, args.num_train_goals, rng, "train")
    test_goals = sample_goals(args.env_id, args.num_test_goals, rng, "test")
    eval_goals = np.concatenate((train_goals[: args.num_test_goals], test_goals))
    splits = np.array(["train"] * (len(eval_goals) - len(test_goals)) + ["test"] * len(test_goals))
    eval_envs = make_envs(args, eval_goals, args.eval_episodes)
    num_episodes = math.ceil(max(args.num_prior_steps, args.num_posterior_steps) / args.horizon)
    envs = make_envs(args, np.resize(train_goals, args.num_collect_goals), num_episodes)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent = Agent(obs_dim, action_dim, args).to(args.device)
    optimizers = make_optimizers(agent, args)
    learn = functools.partial(update, agent, optimizers, args=args)
    if args.cuda_graph:
        learn = CudaGraph(learn)
    widths = (obs_dim, action_dim, 1, obs_dim, 1), (obs_dim + action_dim + 1,)
    buffers = [ReplayBuffer(args.num_train_goals, w, args.buffer_size, args.device) for w in widths]
    tasks = Tasks(train_goals, *buffers)
    parts = {"buffer": tasks.buffer, "encoder_buffer": tasks.encoder_buffer}
    iteration = run.resume(rng, agent=agent, **parts, **optimizers)

    while True:
        run.save_checkpoint(iteration)
        if iteration % args.eval_every == 0 or iteration == args.num_iterations:
            rows, means = [], {}
            for phase, returns in evaluate(agent, eval_envs, args).items():
                for split, goal, value in zip(splits, eval_goals, returns):
                    rows.append((iteration, run.env_steps, split, goal, phase, value))
                means[f"train_{phase}_return"] = returns[splits == "train"].mean()
                means[f"test_{phase}_return"] = returns[splits == "test"].mean()
            run.evaluated(iteration, rows, means)
        run.save_networks(iteration, agent)
        if iteration == args.num_iterations:
            break

        # Collect: at first in all tasks; then in some, with z ~ p(z), and with z ~ q(z|c)
        if iteration == 0:
            chosen, num_steps = np.arange(args.num_train_goals), args.num_initial_steps
            all_envs = make_envs(args, train_goals, math.ceil(num_steps / args.horizon))
            collect(agent, all_envs, tasks, chosen, num_steps, rng, args, posterior=False)
            all_envs.close()
        chosen = rng.integers(args.num_train_goals, size=args.num_collect_goals)
        for task in chosen:
            tasks.encoder_buffer.clear(task)
        for num_steps, posterior in (args.num_prior_steps, False), (args.num_posterior_steps, True):
            collect(agent, envs, tasks, chosen, num_steps, rng, args, posterior=posterior)
        run.env_steps = sum(tasks.buffer.added)

        # Learn: Q and the encoder, V and the policy
        total = 0
        for _ in range(args.num_train_steps):
            batch = sample_batch(tasks, rng, args)
            z_noise = normal(rng, args.meta_batch_size, args.latent_dim, device=args.device)
            noise = normal(rng, *batch.action.shape, device=args.device)
            losses = learn(batch, z_noise, noise)
            total = total + torch.stack([*losses.values()])
        losses = dict(zip(losses, (total / args.num_train_steps).tolist()))  # one host sync
        weights = torch.stack([p.sum() for p in agent.parameters()]).tolist()
        run.check_finite(iteration, **losses, weight=weights)
        run.log(iteration, "losses", losses)
        run.log(iteration, "charts", {"env_steps": run.env_steps})
        iteration += 1
        run.bar.update()

    run.finish(means | {"env_steps": run.env_steps})


# --------------------------------------------------------------------------------------------------
# The method ends here. What follows is the same in all four scripts, to the letter: a run lives in
# a directory that its arguments name, belongs to one process at a time, and goes on from its last
# checkpoint if it was interrupted, bit for bit.

at_end = contextlib.ExitStack()  # closes the environments, unless a signal ends the script


def stop(message: str, code: int = 2) -> NoReturn:
    """Exits with one line on stderr; code 2 means bad use, 1 a run that went wrong."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def check_args(args, *, from_0: tuple[str, ...], to_1: tuple[str, ...]) -> None:
    """Raises ValueError, which tyro reports, for a number out of range or a missing device."""
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if value == ():
            raise ValueError(f"{flag} needs at least one number")
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) in (int, float):
                low = 1 if type(number) is int and name not in from_0 else 0
                high = 1 if name in to_1 else 1e18
                if not low <= number <= high:
                    raise ValueError(f"{flag} {number}: must be from {low} to {high:g}")
    try:
        torch.zeros(1, device=args.device).item()  # fails on meta, which holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {error}") from None
    if args.track and not importlib.util.find_spec("wandb"):
        raise ValueError("--track needs Weights & Biases: pip install wandb")


def write(file: Path, content: str | dict, previous: Path | None = None) -> None:
    """Replaces a file, whole even at a crash or on a full disk; the old one becomes `previous`."""
    tmp = file.with_name(file.name + ".tmp")
    try:
        with open(tmp, "wb") as stream:
            if isinstance(content, str):
                stream.write(content.encode())
            else:
                torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if previous and file.exists():
            os.replace(file, previous)
        os.replace(tmp, file)
    except (OSError, RuntimeError) as error:
        tmp.unlink(missing_ok=True)
        stop(f"cannot write {file}: {error.__context__ or error}", code=1)


class Run:
    """The directory RUNS_DIR/EXP_NAME/ENV_ID/MODEL/seedSEED and what it holds.

    Its steps are environment steps (TD3, SAC) or iterations (MAML, PEARL). The scalars of step N
    are logged after checkpoint N, so that a run resumed from it logs them again, and none twice.
    """

    # Arguments that do not affect the numbers, so that a run may be resumed with others
    FREE = "total_timesteps num_iterations runs_dir track checkpoint_every save_every".split()

    def __init__(self, args, model: str, total: int, columns: str):
        """Locks the directory; exits if another process has it."""
        self.args, self.total, self.eval_csv = args, total, columns + "\n"
        self.unit = columns.split(",")[0]  # global_step or iteration
        names = (".", args.exp_name, re.sub("[/:]", "-", args.env_id), model, f"seed{args.seed}")
        try:
            self.dir = Path(args.runs_dir, "/".join(names)).expanduser()
            file = self.dir / ".lock"
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(file, timeout=1)
            self.lock.acquire()
            if not isinstance(self.lock, filelock.SoftFileLock):  # which writes the same by itself
                file.write_text(f"{os.getpid()}\n{os.uname().nodename}\n")
        except filelock.Timeout:
            holder = "process " + " on ".join(file.read_text().split()[:2])
            stop(f"another process is training in {self.dir} ({holder}); if gone, remove {file}")
        except (OSError, RuntimeError) as error:
            stop(f"--runs-dir {args.runs_dir}: cannot write or lock there: {error}")

    def resume(self, rng: np.random.Generator, **parts) -> int:
        """Loads the last checkpoint. Returns its step, 0 in a new run; exits in a complete one."""
        self.rng, self.parts, self.env_steps, self.next_checkpoint = rng, parts, 0, 0
        self.config = json.loads(json.dumps(asdict(self.args)))
        summary, step = self.dir / "summary.json", 0
        if checkpoint := self.load_checkpoint():
            old, step = checkpoint["args"], checkpoint["step"]
            differ = [n for n in self.config if n not in self.FREE and old.get(n) != self.config[n]]
            if differ:
                changes = ", ".join(f"{n} was {old.get(n)} and is {self.config[n]}" for n in differ)
                stop(f"{self.dir} holds another run: {changes}; remove it or set --exp-name")
            done = json.loads(summary.read_text())[self.unit] if summary.exists() else step
            if done > self.total:
                stop(f"{self.dir} has already reached {self.unit} {done}, not {self.total}")
            if done == self.total and summary.exists():
                print(f"{self.dir} is complete")
                sys.exit()
            if summary.exists() and not (old["save_every"] and done % old["save_every"] == 0):
                (self.dir / f"step_{done}.pt").unlink(missing_ok=True)  # no longer the last
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            rng.bit_generator.state = checkpoint["rng"]
            self.eval_csv, self.env_steps = checkpoint["eval_csv"], checkpoint["env_steps"]
            os.replace(checkpoint["file"], self.dir / "checkpoint.pt")
            self.next_checkpoint = step + self.args.checkpoint_every
        summary.unlink(missing_ok=True)
        write(self.dir / "eval.csv", self.eval_csv)
        versions = {n: sys.modules[n].__version__ for n in ("torch", "numpy", "gymnasium")}
        git = ["env", "git", "-C", Path(__file__).parent, "rev-parse", "--verify", "HEAD"]
        versions["git"] = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
        config = {"args": self.config, "threads": torch.get_num_threads(), "versions": versions}
        write(self.dir / "config.json", json.dumps(config, indent=2) + "\n")
        print(f"{self.dir}: {self.unit} {step} of {self.total}")
        if self.args.track:
            import wandb

            if not (id_file := self.dir / "wandb_id").exists():
                write(id_file, os.urandom(8).hex())
            options = dict(id=id_file.read_text(), resume="allow", sync_tensorboard=True)
            try:
                wandb.init(project="hypernets", name=str(self.dir), config=self.config, **options)
            except wandb.Error as error:
                stop(f"--track: {error}")
        for i, file in enumerate(sorted(self.dir.glob("events.*"))):  # the new one must sort last
            file.rename(file.with_name(re.sub(r"\d+", f"{i:010}", file.name, count=1)))
        self.writer = SummaryWriter(self.dir, purge_step=step)
        self.bar = tqdm(initial=step, total=self.total, smoothing=0, disable=None)
        self.first_env_steps, self.clock = self.env_steps, time.perf_counter()
        return step

    def load_checkpoint(self) -> dict | None:
        """The newest intact checkpoint; None if the run is new; exits if none is intact."""
        files = [self.dir / "checkpoint.pt", self.dir / "checkpoint.prev.pt"]
        for file in filter(Path.exists, files):
            try:
                if ZipFile(file).testzip():
                    raise ValueError("wrong checksum")
                return torch.load(file, map_location="cpu", weights_only=True) | {"file": file}
            except Exception as error:  # many kinds, depending on where the damage is
                print(f"warning: {file} is damaged ({error})", file=sys.stderr)
        if any(file.exists() for file in (*files, self.dir / "summary.json")):
            stop(f"no intact checkpoint in {self.dir}; remove the directory to start afresh")
        return None

    def save_checkpoint(self, step: int) -> None:
        """Saves all that the rest of the run depends on, if it is due; keeps the previous one."""
        if step >= self.next_checkpoint or step == self.total:
            self.writer.flush()
            state = {"args": self.config, "step": step, "env_steps": self.env_steps}
            state |= {"eval_csv": self.eval_csv, "rng": self.rng.bit_generator.state}
            state |= {name: part.state_dict() for name, part in self.parts.items()}
            write(self.dir / "checkpoint.pt", state, previous=self.dir / "checkpoint.prev.pt")
            self.next_checkpoint = step + self.args.checkpoint_every

    def save_networks(self, step: int, networks: nn.Module) -> None:
        """Saves step_N.pt, if it is due."""
        every = self.args.save_every
        if step == self.total or (every and step % every == 0):
            write(self.dir / f"step_{step}.pt", networks.state_dict())

    def check_finite(self, step: int, **quantities) -> None:
        """Ends the run if one of the quantities is infinite or not a number."""
        for name, value in quantities.items():
            if not np.isfinite(value).all():
                stop(f"{name} is not finite at {self.unit} {step}", code=1)

    def log(self, step: int, group: str, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def evaluated(self, step: int, rows: list[tuple], means: dict[str, float]) -> None:
        """Adds rows to eval.csv, and sends their means to TensorBoard and to the screen."""
        self.check_finite(step, **means)
        self.eval_csv += "".join(",".join(map(str, row)) + "\n" for row in rows)
        write(self.dir / "eval.csv", self.eval_csv)
        sps = (self.env_steps - self.first_env_steps) / (time.perf_counter() - self.clock)
        self.log(step, "eval", means)
        self.log(step, "charts", {"SPS": sps})
        text = ", ".join(f"{name} {value:.1f}" for name, value in means.items())
        self.bar.write(f"{self.unit} {step}: {text} ({sps:.0f} environment steps per second)")

    def finish(self, results: dict[str, float]) -> None:
        """Marks the run as complete."""
        self.writer.close()
        self.bar.close()
        write(self.dir / "summary.json", json.dumps({self.unit: self.total} | results) + "\n")
        print(f"{self.dir} is complete")


if __name__ == "__main__":
    sys.stdout, sys.stderr = (f or open(os.devnull, "w") for f in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # it may be unable to write π
    os.set_inheritable(sys.stderr.fileno(), True)  # a child process of glfw needs one
    try:
        args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
        tune(args.device, args.precision)
        with at_end:
            train(args)
    except OSError as error:  # the disk is full, say
        stop(str(error), code=1)
