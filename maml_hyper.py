"""MAML-TRPO (Finn et al., 2017) with the three policies of the hypernetwork paper (Sec. 4).

With `--model hyper` a primary network turns the task's context c into the weights of a small
dynamic network, π_{w(c)}(a|s): the context makes the policy, and the state alone is its input.
`context` is an MLP on [s, c], `vanilla` one on s alone.

An iteration samples episodes of each task with the weights θ, takes a gradient step on them to get
θ_i (`inner_step`, Eq. 15), samples again with θ_i, and moves θ by a step of TRPO (`update`).

    python maml_hyper.py --env-id HalfCheetahFwdBack-v0 --model hyper

In the help, (paper) marks a value from the paper and (released) one from the authors' code.
"""

import contextlib
import ctypes
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
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
import torch.autograd.forward_ad as fwAD
import tyro
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hypernet import HyperNetwork, tune
from meta_envs import FAMILIES, MetaVectorEnv, sample_goals


@dataclass
class Args:
    model: Literal["vanilla", "context", "hyper"] = "hyper"
    """policy: MLP on the state, MLP on state and context, or hypernetwork (paper, Sec. 4)"""
    primary_widths: tuple[int, ...] = (256, 512, 1024)
    """widths of the primary network, for hyper (released)"""
    dynamic_width: int = 256
    """hidden units of the dynamic network, for hyper (paper, Sec. 2)"""
    hyper_init: Literal["released", "paper", "bias"] = "released"
    """how the dynamic weights start, see init_heads in hypernet.py and results/choices.md"""
    num_train_goals: int = 100
    """tasks to train on, drawn once from the seed (released)"""
    num_test_goals: int = 20
    """tasks to evaluate on, drawn once from the seed (released)"""
    meta_batch_size: int = 40
    """tasks of one iteration (released)"""
    episodes_per_goal: int = 20
    """episodes of a task before each inner step, and as many after the last (released)"""
    horizon: int = 200
    """environment steps of an episode (released)"""
    gamma: float = 0.95
    """discount factor (released)"""
    gae_lambda: float = 1.0
    """λ of the generalised advantage estimate (released)"""
    num_adapt_steps: int = 1
    """inner steps of Eq. 15; 0 trains the policy without adaptation (released)"""
    inner_lr: float | None = None
    """η of Eq. 15; None means 5e-5 for hyper, 0.1 for the others (released)"""
    first_order: bool = False
    """treat inner steps as constants in the whole update, as the released code's gradient does"""
    max_kl: float = 0.01
    """mean KL divergence by which one update may move the adapted policies, in nats (released)"""
    cg_iterations: int = 10
    """iterations of the conjugate gradient (released)"""
    cg_damping: float = 1e-5
    """added to the diagonal of the Fisher matrix (released)"""
    line_search_steps: int = 20
    """step sizes that the line search tries, each 0.8 times the one before (released)"""

    env_id: Literal[tuple(FAMILIES)] = "HalfCheetahFwdBack-v0"
    """family of tasks, one of FAMILIES in meta_envs.py (paper)"""
    seed: int = 1
    """seed of goals, network weights, environments and action noise (paper: 5 seeds)"""
    num_iterations: int = 400
    """meta-updates of the whole run; a larger number extends a run (released)"""
    eval_every: int = 1
    """iterations between two evaluations; there is one before any update and one at the end"""
    eval_episodes: int = 20
    """episodes of a test goal before and after adaptation, with the stochastic policy (released)"""
    checkpoint_every: int = 5
    """iterations between two checkpoints"""
    save_every: int = 0
    """iterations between two step_N.pt, the policy alone; 0 saves the last one only"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """precision of the policy's matrix products; everything else is float32"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where the networks live, and the episodes that they learn from"""
    runs_dir: str = "runs"
    """the run goes to RUNS_DIR/EXP_NAME/ENV_ID/MODEL/seedSEED"""
    exp_name: str = "maml_hyper"
    """name of the experiment, a part of the run directory"""
    track: bool = False
    """send the TensorBoard scalars to Weights & Biases too (needs: pip install wandb)"""

    def __post_init__(self):
        if self.inner_lr is None:
            self.inner_lr = 5e-5 if self.model == "hyper" else 0.1
        check_args(
            self, from_0=("seed", "save_every", "num_adapt_steps"), to_1=("gamma", "gae_lambda")
        )
        if self.meta_batch_size > self.num_train_goals:
            raise ValueError("--meta-batch-size must not be above --num-train-goals")
        if self.max_kl == 0:
            raise ValueError("--max-kl must be above 0")


class Gaussian(NamedTuple):
    """Policies of T tasks at N states each."""

    mean: Tensor  # (T, N, action)
    log_std: Tensor  # (T, 1, action)

    def log_prob(self, action: Tensor) -> Tensor:
        """log N(action; mean, exp(log_std)²), summed over the dimensions of the action: (T, N)"""
        z = (action - self.mean) / self.log_std.exp()
        return -(0.5 * z.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


class Policy(nn.Module):
    """Gaussian policies of T tasks: context (T, 1), obs (T, N, obs) -> Gaussian.

    The mean comes from an MLP of 100-100 with Xavier weights (released) or from a dynamic network;
    the log_std does not depend on the state.
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.model, self.precision = args.model, args.precision
        if self.model == "hyper":
            widths = dict(primary_widths=args.primary_widths, dynamic_width=args.dynamic_width)
            self.net = HyperNetwork(1, obs_dim, action_dim, init=args.hyper_init, **widths)
        else:
            widths = (obs_dim + (self.model == "context"), 100, 100, action_dim)
            layers = [nn.Linear(*dims) for dims in zip(widths, widths[1:])]
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            self.net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        with warnings.catch_warnings(action="ignore"):  # "initializing zero-element tensors"
            self.log_std = nn.Linear(0, action_dim)  # a bias alone; adapted like a layer
        nn.init.zeros_(self.log_std.bias)

    def autocast(self, x: Tensor) -> torch.autocast:
        """Within, matrix products have the precision of `--precision`."""
        enabled = self.precision == "bfloat16"
        return torch.autocast(x.device.type, torch.bfloat16, enabled=enabled)

    def generate(self, context: Tensor) -> tuple:
        """What is the same for all states of a task: dynamic weights or context, and log_std."""
        log_std = self.log_std(context[:, :0]).unsqueeze(1)
        with self.autocast(context):
            return (self.net.generate(context) if self.model == "hyper" else context), log_std

    def dynamic(self, generated, obs: Tensor) -> Tensor:
        """The mean (T, N, action) at obs (T, N, obs), with the first output of `generate`."""
        with self.autocast(obs):
            if self.model == "hyper":
                return self.net.dynamic(generated, obs).to(obs.dtype)
            if self.model == "context":
                context = generated.unsqueeze(1).expand(-1, obs.shape[1], -1)
                obs = torch.cat([obs, context], -1)
            return self.net(obs).to(obs.dtype)

    def forward(self, context: Tensor, obs: Tensor) -> Gaussian:
        generated, log_std = self.generate(context)
        return Gaussian(self.dynamic(generated, obs), log_std)


# An inner step (Eq. 15) without a copy of the policy's millions of weights for each task. A layer
# y = W x + b of a hypernetwork sees one vector of a task, made from its context. If it saw x_k in
# the step, its gradients are ∂L/∂W = δ x_kᵀ, of rank one, and ∂L/∂b = δ, with δ = ∂L/∂y. After a
# step of η, its output at x (not x_k any more, once the layers before it have moved) is
#     (W - η δ x_kᵀ) x + (b - η δ) = y - η δ (x_k · x + 1),
# for which x_k and -η δ are enough (`RankOneStep`). A layer of an MLP sees the N states of a task,
# but is small and keeps the change of W and b (`FullStep`). Both are compared with a copy of the
# whole policy in test_adapted_layers_act_as_a_copy_of_all_parameters_a_task_would, test_maml.py.


class FullStep(NamedTuple):
    """What an inner step changes in a layer that sees N states of each of T tasks."""

    dW: Tensor  # (T, in, out)
    db: Tensor  # (T, 1, out)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The output (T, N, out) at x (T, N, in) after the step, y before it."""
        return y + x @ self.dW + self.db


class RankOneStep(NamedTuple):
    """What an inner step changes in a layer that sees one context of each of T tasks."""

    x_k: Tensor  # (T, in), what it saw in that step
    dy: Tensor  # (T, out), -η δ

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The output (T, out) at x (T, in) after the step, y before it."""
        return y + ((x * self.x_k).sum(-1, keepdim=True) + 1) * self.dy


InnerStep = dict[nn.Linear, FullStep | RankOneStep]  # of every layer


@contextlib.contextmanager
def adapted(policy: Policy, inner_steps: list[InnerStep]) -> Iterator[dict[nn.Linear, tuple]]:
    """Inside, each layer's output for task i is as if its weights were θ_i; θ stays as it is.

    Yields the last input and output (x, y) of each layer.
    """
    seen = {}

    def add_steps(layer: nn.Linear, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        (x,) = inputs
        y = y.to(x.dtype)  # float32, where autocast made it bfloat16
        for step in inner_steps:
            y = step[layer](x, y)
        if torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_()  # for δ, where θ itself is a constant
        seen[layer] = (x, y)
        return y

    with contextlib.ExitStack() as hooks:  # which removes them at the end
        for layer in policy.modules():
            if isinstance(layer, nn.Linear):
                hooks.enter_context(layer.register_forward_hook(add_steps))
        yield seen


class Batch(NamedTuple):
    """Samples of T tasks, N = episodes * horizon of each."""

    context: Tensor  # (T, 1)
    obs: Tensor  # (T, N, obs)
    action: Tensor  # (T, N, action)
    advantage: Tensor  # (T, N), mean 0 and variance 1 over each task
    sample_weight: Tensor  # (T, N), sums to 1 over each task; 0 after an episode's early end


def inner_step(
    policy: Policy, theta: dict, steps: list[InnerStep], batch: Batch, lr: float, second_order: bool
) -> InnerStep:
    """-η ∇L_i of each task with L_i = -mean Â log π_{θ_i}(a|s), where θ_i is θ after `steps`.

    Eq. 15 with the mean over a task's samples in place of the sum over each episode (released).
    With `second_order`, the result can be differentiated with respect to θ.
    """
    with adapted(policy, steps) as seen, torch.enable_grad():
        gaussian = functional_call(policy, theta, (batch.context, batch.obs))
        loss = -(batch.sample_weight * batch.advantage * gaussian.log_prob(batch.action)).sum()
    deltas = torch.autograd.grad(loss, [y for _, y in seen.values()], create_graph=second_order)
    step = {}
    for (layer, (x, _)), delta in zip(seen.items(), deltas):
        dy = -lr * delta
        if x.dim() == 2:  # (T, in), one input of a task
            step[layer] = RankOneStep(x, dy)
        else:
            step[layer] = FullStep(x.mT @ dy, dy.sum(1, keepdim=True))
    return step


class MetaBatch(NamedTuple):
    """What the update learns from."""

    pre: list[Batch]  # samples before each inner step
    inner_steps: list[InnerStep]  # as they were taken for sampling; only --first-order needs them
    post: Batch  # samples after the last


CHUNK = 80_000  # samples that go through a policy at once, which bounds the memory


def split_tasks(samples: tuple) -> list[tuple]:
    """A MetaBatch, or a tuple that ends with a Batch, in chunks of `CHUNK` samples or one task."""
    T, N = samples[-1].sample_weight.shape
    size = max(1, CHUNK // N)
    slices = [slice(i, i + size) for i in range(0, T, size)]
    return [tree_map(lambda x, tasks=tasks: x[tasks], samples) for tasks in slices]


def adapted_outputs(
    policy: Policy, theta: Tensor, chunk: MetaBatch, args: Args, second_order: bool = True
) -> Gaussian:
    """The adapted policies π_{θ_i} at the states of `chunk.post`, as a function of the vector θ."""
    pieces = theta.split([parameter.numel() for parameter in policy.parameters()])
    theta = {n: piece.view_as(p) for (n, p), piece in zip(policy.named_parameters(), pieces)}
    if args.first_order:
        inner_steps = chunk.inner_steps  # constants, from the sampling
    else:
        inner_steps = []  # taken again from θ, so that the gradient flows through them
        for batch in chunk.pre:
            step = inner_step(policy, theta, inner_steps, batch, args.inner_lr, second_order)
            inner_steps.append(step)
    with adapted(policy, inner_steps):
        return functional_call(policy, theta, (chunk.post.context, chunk.post.obs))


def surrogate_and_kl(new: Gaussian, old: Gaussian, post: Batch, args: Args) -> Tensor:
    """A chunk's part of the mean of Â π_new / π_old and of KL(π_old ‖ π_new): (2,)"""
    weight = 1 / args.meta_batch_size * post.sample_weight
    ratio = (new.log_prob(post.action) - old.log_prob(post.action)).exp()
    variance, old_variance = (2 * new.log_std).exp(), (2 * old.log_std).exp()
    kl = (old_variance + (old.mean - new.mean).square()) / (2 * variance) - 0.5
    kl = (kl + new.log_std - old.log_std).sum(-1)
    return torch.stack([(weight * post.advantage * ratio).sum(), (weight * kl).sum()])


def meta_gradient(
    policy: Policy, theta: Tensor, chunk: MetaBatch, args: Args
) -> tuple[Tensor, Gaussian]:
    """∇_θ of the chunk's surrogate (see `adapted_outputs`), and its adapted policies at θ."""
    new = adapted_outputs(policy, theta, chunk, args)
    old = Gaussian(new.mean.detach(), new.log_std.detach())
    surrogate, _ = surrogate_and_kl(new, old, chunk.post, args)
    return torch.autograd.grad(surrogate, theta)[0], old


def fisher_product(
    policy: Policy, theta: Tensor, chunk: MetaBatch, vector: Tensor, args: Args
) -> Tensor:
    """The Hessian of the chunk's KL at θ times a vector, exactly: Jᵀ F J v.

    J is the Jacobian of the adapted policies' outputs, F the Fisher metric of a Gaussian, 1/σ² for
    its mean and 2 for its log_std. J v is computed in forward mode (one pass, where double backward
    has three), and multiplied by Jᵀ in a backward pass.
    """
    with fwAD.dual_level():
        duals = adapted_outputs(policy, fwAD.make_dual(theta, vector), chunk, args)
        mean, d_mean = fwAD.unpack_dual(duals.mean)
        log_std, d_log_std = fwAD.unpack_dual(duals.log_std)
    share, variance = 1 / args.meta_batch_size, (2 * log_std.detach()).exp()
    weight = share * chunk.post.sample_weight.unsqueeze(-1)
    F_J_v = (weight * d_mean.detach() / variance, 2 * share * d_log_std.detach())
    return torch.autograd.grad((mean, log_std), theta, F_J_v)[0]


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Approximately solves A x = b for a symmetric, positive definite A with A v = product(v)."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    r_dot_r = r.dot(r)
    for _ in range(iterations):
        if r_dot_r <= 1e-10:
            break
        Ap = product(p)
        alpha = r_dot_r / p.dot(Ap)
        x += alpha * p
        r -= alpha * Ap
        r_dot_r, before = r.dot(r), r_dot_r
        p = r + r_dot_r / before * p
    return x


@torch.no_grad()
def line_search(
    policy: Policy, full_step: Tensor, chunks: list[MetaBatch], old: Sequence[Gaussian], args: Args
) -> dict[str, float]:
    """Moves θ by the largest 0.8^k full_step with a better surrogate and a small KL, if any."""
    theta = parameters_to_vector(policy.parameters())

    def measure(new: Iterable[Gaussian]) -> list[float]:
        rows = [surrogate_and_kl(n, o, c.post, args) for n, o, c in zip(new, old, chunks)]
        return torch.stack(rows).sum(0).tolist()

    before, _ = measure(old)
    for k in range(args.line_search_steps):
        candidate = theta + 0.8**k * full_step
        new = (adapted_outputs(policy, candidate, c, args, second_order=False) for c in chunks)
        surrogate, kl = measure(new)
        if surrogate > before and kl <= args.max_kl:
            vector_to_parameters(candidate, policy.parameters())
            return {"surrogate": surrogate - before, "kl": kl, "step_size": 0.8**k}
    return {"surrogate": 0.0, "kl": 0.0, "step_size": 0.0}


def update(policy: Policy, meta_batch: MetaBatch, args: Args) -> dict[str, float]:
    """One TRPO step of θ on the surrogate. Returns statistics of the step."""
    theta, chunks = parameters_to_vector(policy.parameters()), split_tasks(meta_batch)

    def product(vector: Tensor) -> Tensor:
        products = (fisher_product(policy, theta, chunk, vector, args) for chunk in chunks)
        return sum(products) + args.cg_damping * vector

    gradients, old = zip(*(meta_gradient(policy, theta, chunk, args) for chunk in chunks))
    gradient = sum(gradients)
    direction = conjugate_gradient(product, gradient, args.cg_iterations)
    length = (2 * args.max_kl / direction.dot(product(direction))).sqrt()
    result = line_search(policy, length * direction, chunks, old, args)
    return {"gradient_norm": gradient.norm().item()} | result


class Rollout(NamedTuple):
    """E episodes of T tasks, H steps each."""

    context: Tensor  # (T, 1)
    obs: np.ndarray  # (T, E, H, obs)
    action: np.ndarray  # (T, E, H, action)
    reward: np.ndarray  # (T, E, H)
    alive: np.ndarray  # (T, E, H), False after an episode's early end


def discounted_returns(reward: np.ndarray, gamma: float) -> np.ndarray:
    """Σ_k γ^k r_{t+k} to the end of the episode: (T, E, H) -> (T, E, H)"""
    returns = reward.copy()
    for t in reversed(range(reward.shape[-1] - 1)):
        returns[..., t] += gamma * returns[..., t + 1]
    return returns


def linear_baseline(obs: np.ndarray, alive: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """V(s, t) of each task: least squares fit of its returns on obs, obs², t, t², t³ and 1, with t
    in hundreds of steps and a ridge of 1e-5 (released): (T, E, H)"""
    T, E, H = alive.shape
    x, clock = obs.astype(np.float64), np.broadcast_to(np.arange(H) / 100, alive.shape)
    features = [x, x**2, np.stack([clock, clock**2, clock**3, np.ones_like(clock)], -1)]
    X = (np.concatenate(features, -1) * alive[..., None]).reshape(T, E * H, -1)
    ridge = 1e-5 * np.eye(X.shape[-1])
    w = np.linalg.solve(X.mT @ X + ridge, X.mT @ returns.reshape(T, E * H, 1))
    return (X @ w).reshape(T, E, H)


def advantages(reward: np.ndarray, value: np.ndarray, args: Args) -> np.ndarray:
    """Generalised advantages Σ_k (γλ)^k δ_{t+k} of δ_t = r_t + γ V(s_{t+1}) - V(s_t): (T, E, H)"""
    delta = reward - value
    delta[..., :-1] += args.gamma * value[..., 1:]
    return discounted_returns(delta, args.gamma * args.gae_lambda)


def make_batch(rollout: Rollout, args: Args) -> Batch:
    """The samples with their advantages, normalised over each task."""
    context, obs, action, reward, alive = rollout
    value = linear_baseline(obs, alive, discounted_returns(reward, args.gamma))
    advantage = advantages(reward, value, args)
    weight = alive / alive.sum((1, 2), keepdims=True)
    advantage -= (weight * advantage).sum((1, 2), keepdims=True)
    variance = (weight * advantage**2).sum((1, 2), keepdims=True)
    advantage = alive * advantage / np.sqrt(variance + 1e-8)
    arrays = (obs, action, advantage, weight)
    samples = (torch.as_tensor(x, dtype=torch.float32, device=args.device) for x in arrays)
    return Batch(context, *(x.flatten(1, 2) for x in samples))  # (T, E, H, ...) -> (T, N, ...)


@torch.no_grad()
def collect_episodes(
    policy: Policy, inner_steps: list, envs: MetaVectorEnv, rng: np.random.Generator, args: Args
) -> Rollout:
    """An episode in each slot of `envs` with the adapted policies."""
    T, E, H = len(envs.goals), envs.episodes_per_goal, args.horizon
    low, high = envs.single_action_space.low, envs.single_action_space.high
    all_obs = np.zeros((H, T, E, *envs.single_observation_space.shape), dtype=np.float32)
    all_actions = np.zeros((H, T, E, *low.shape), dtype=np.float32)
    rewards, alive = np.zeros((H, T, E)), np.zeros((H, T, E), dtype=bool)
    context = torch.as_tensor(envs.goals[:, None], dtype=torch.float32, device=args.device)
    obs, _ = envs.reset(seed=int(rng.integers(2**31)))
    done = np.zeros(T * E, dtype=bool)
    with adapted(policy, inner_steps):
        generated, log_std = policy.generate(context)
        for t in range(H):
            all_obs[t], alive[t] = obs.reshape(T, E, -1), ~done.reshape(T, E)
            mean = policy.dynamic(generated, torch.from_numpy(all_obs[t]).to(args.device))
            noise = rng.standard_normal(mean.shape, dtype=np.float32)  # (T, E, action)
            action = (mean + log_std.exp() * torch.from_numpy(noise).to(args.device)).cpu().numpy()
            for goal in envs.goals[~np.isfinite(action).all((1, 2))]:
                hint = f": lower --inner-lr {args.inner_lr:g}" if inner_steps else ""
                stop(f"the policy of goal {goal:g} is not finite{hint}", code=1)
            clipped = action.reshape(T * E, -1).clip(low, high)
            obs, reward, terminated, truncated, _ = envs.step(clipped)
            all_actions[t], rewards[t] = action, reward.reshape(T, E)
            done = terminated | truncated
            if done.all():
                break
    arrays = (np.moveaxis(x, 0, 2) for x in (all_obs, all_actions, rewards, alive))
    return Rollout(context, *arrays)


def adapt_and_sample(
    policy: Policy, envs: MetaVectorEnv, rng: np.random.Generator, args: Args
) -> tuple[list[Rollout], list[Batch], list[InnerStep]]:
    """Episodes of θ, an inner step on them, episodes of θ_i; and so on for more inner steps.

    Returns all episodes, what the inner steps learned from, and the inner steps.
    """
    theta = policy.state_dict()  # constants
    rollouts, batches, inner_steps = [collect_episodes(policy, [], envs, rng, args)], [], []
    for _ in range(args.num_adapt_steps):
        batches.append(make_batch(rollouts[-1], args))
        chunks = [
            inner_step(policy, theta, earlier, batch, args.inner_lr, second_order=False)
            for earlier, batch in split_tasks((inner_steps, batches[-1]))
        ]
        inner_steps.append(tree_map(lambda *tasks: torch.cat(tasks).detach(), *chunks))
        rollouts.append(collect_episodes(policy, inner_steps, envs, rng, args))
    return rollouts, batches, inner_steps


def mean_returns(rollouts: list[Rollout]) -> dict[str, np.ndarray]:
    """Mean return of each task (T,) before ("pre") and, if there is any, after adaptation."""
    returns = [rollout.reward.sum(-1).mean(1) for rollout in rollouts]
    return {"pre": returns[0]} | ({"post": returns[-1]} if len(returns) > 1 else {})


def evaluate(policy: Policy, envs: MetaVectorEnv, args: Args) -> dict[str, np.ndarray]:
    """The mean returns on test goals, always from the same starts and with the same noise."""
    rng = np.random.default_rng(args.seed + 100)
    return mean_returns(adapt_and_sample(policy, envs, rng, args)[0])


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory. By default each large tensor goes back to the system and is
    paged in anew the next time, which takes as long as the arithmetic (measured: results/speed.md).
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB
        libc.mallopt(-2, 2**26)  # M_TOP_PAD: take 64 MiB at a time


def train(args: Args) -> None:
    run = Run(args, args.model, args.num_iterations, "iteration,env_steps,split,goal,phase,return")
    keep_freed_memory()
    torch.manual_seed(args.seed)  # initial weights
    rng = np.random.default_rng(args.seed)  # goals, environments, actions
    train_goals = sample_goals(args.env_id, args.num_train_goals, rng, "train")
    test_goals = sample_goals(args.env_id, args.num_test_goals, rng, "test")
    simulation = (torch.get_num_threads(), args.horizon)
    first_goals = train_goals[: args.meta_batch_size]
    envs = MetaVectorEnv(args.env_id, first_goals, args.episodes_per_goal, *simulation)
    test_envs = MetaVectorEnv(args.env_id, test_goals, args.eval_episodes, *simulation)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    policy = Policy(obs_dim, action_dim, args).to(args.device)
    iteration = run.resume(rng, policy=policy)

    while True:
        run.save_checkpoint(iteration)

        # Sample: episodes of each task with θ, an inner step (Eq. 15), episodes with θ_i
        envs.set_goals(rng.choice(train_goals, args.meta_batch_size, replace=False))
        rollouts, pre, inner_steps = adapt_and_sample(policy, envs, rng, args)
        train_returns = mean_returns(rollouts)

        if iteration % args.eval_every == 0 or iteration == args.num_iterations:
            test_returns = evaluate(policy, test_envs, args)
            rows, means = [], {}
            results = ("train", envs.goals, train_returns), ("test", test_goals, test_returns)
            for split, goals, returns in results:
                for phase, values in returns.items():
                    for goal, value in zip(goals, values):
                        rows.append((iteration, run.env_steps, split, goal, phase, value))
                    means[f"{split}_{phase}_return"] = values.mean()
            run.evaluated(iteration, rows, means)
        run.save_networks(iteration, policy)
        if iteration == args.num_iterations:
            break

        # Learn: one TRPO step of θ on all tasks
        losses = update(policy, MetaBatch(pre, inner_steps, make_batch(rollouts[-1], args)), args)
        run.check_finite(iteration, **losses)
        run.log(iteration, "losses", losses)
        run.log(iteration, "charts", {f"{p}_return": r.mean() for p, r in train_returns.items()})
        iteration += 1
        run.env_steps += sum(int(rollout.alive.sum()) for rollout in rollouts)
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
