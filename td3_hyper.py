"""TD3 (Fujimoto et al., 2018) with any of the eight critics of the hypernetwork paper (Sec. 5.2).

With `--critic sa-hyper`, Q(s, a) = f_{w(s)}(a): a primary network turns the state into the weights
w(s) of a small dynamic network that acts on the action (Sec. 3; `HyperNetwork` in hypernet.py). The
actor follows ∇_a Q, which flows through the dynamic network alone (Fig. 2; `actor_loss` below).

    python td3_hyper.py --env-id Hopper-v4 --critic sa-hyper

In the help, (paper) marks a value from the paper and (released) one from the authors' code.
"""

import ast
import contextlib
import copy
import functools
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn
from zipfile import ZipFile

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # lets two runs share cores (results/speed.md)
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no clean-up, here or later

import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hypernet import CudaGraph, make_critic, tune


@dataclass
class Args:
    critic: Literal["mlp", "mlp-small", "mlp-large", "resnet-features", "resnet35", "d2rl",
                    "as-hyper", "sa-hyper"] = "sa-hyper"  # fmt: skip
    """Q-network, see make_critic in hypernet.py (paper, Sec. 5.2)"""
    primary_widths: tuple[int, ...] = (256, 512, 1024)
    """widths of the primary network, for sa-hyper, as-hyper and resnet-features (released)"""
    dynamic_width: int = 256
    """hidden units of the dynamic network (paper, Sec. 2)"""
    hyper_init: Literal["released", "paper", "bias"] = "released"
    """how the dynamic weights start, see init_heads in hypernet.py and results/choices.md"""
    learning_starts: int | None = None
    """random steps first; None: 1,000 (released), 10,000 for HalfCheetah and Ant (TD3's paper)"""
    batch_size: int = 100
    """transitions in an update (released)"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds (released)"""
    gamma: float = 0.99
    """discount factor (released)"""
    tau: float = 0.005
    """how far the targets move towards the online networks at each actor update (released)"""
    actor_lr: float = 3e-4
    """Adam's learning rate for the actor (released)"""
    critic_lr: float | None = None
    """critics' learning rate; None means 5e-5 for sa-hyper and as-hyper, else 3e-4 (released)"""
    exploration_noise: float = 0.1
    """std of the exploration noise; actions are in [-1, 1] (released)"""
    target_noise: float = 0.2
    """std of the noise on the target action (released)"""
    noise_clip: float = 0.5
    """bound of the noise on the target action (released)"""
    policy_frequency: int = 2
    """critic updates for each update of the actor and the targets (released)"""

    env_id: str = "Hopper-v4"
    """Gymnasium environment with bounded actions (paper: Hopper, Walker2d, Ant, HalfCheetah)"""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """the environment's own arguments, as in Python (the paper's Ant: ctrl_cost_weight 0.005)"""
    seed: int = 1
    """seed of all random numbers (paper: 5 seeds)"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole run; a larger number extends a run (released)"""
    eval_every: int = 5_000
    """environment steps between two evaluations; the last step is evaluated, too (released)"""
    eval_episodes: int = 10
    """episodes in an evaluation, with the deterministic policy (released)"""
    checkpoint_every: int = 5_000
    """environment steps between two checkpoints, each taken when the next episode ends"""
    save_every: int = 0
    """environment steps between two saves of the networks (step_N.pt); 0 saves only the last"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """arithmetic inside the critics; weights, losses and the actor are always float32"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where the networks and the replay buffer live"""
    cuda_graph: bool = False
    """on a GPU, record the update once and replay it, which saves launching its kernels"""
    runs_dir: str = "runs"
    """the run goes to RUNS_DIR/EXP_NAME/ENV_ID/CRITIC/seedSEED"""
    exp_name: str = "td3_hyper"
    """name of the experiment, a part of the run directory"""
    track: bool = False
    """send the TensorBoard scalars to Weights & Biases too (needs: pip install wandb)"""

    def __post_init__(self):
        if self.critic_lr is None:
            self.critic_lr = 5e-5 if self.critic in ("sa-hyper", "as-hyper") else 3e-4
        if self.learning_starts is None:
            slow = self.env_id.rpartition("-v")[0] in ("HalfCheetah", "Ant")
            self.learning_starts = 10_000 if slow else 1_000
        self.env_kwargs = {name: read_value(value) for name, value in self.env_kwargs.items()}
        check_args(self, from_0=("seed", "save_every", "learning_starts"), to_1=("gamma", "tau"))
        if (starts := self.learning_starts) >= self.total_timesteps:
            raise ValueError(f"--learning-starts {starts} must be below --total-timesteps")
        if self.cuda_graph and not self.device.startswith("cuda"):
            raise ValueError("--cuda-graph needs --device cuda")


class Actor(nn.Module):
    """Deterministic policy: obs (..., obs) -> action (..., action) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.hidden1 = nn.Linear(obs_dim, 256)
        self.hidden2 = nn.Linear(256, 256)
        self.output = nn.Linear(256, action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        h = F.relu(self.hidden2(F.relu(self.hidden1(obs))))
        return torch.tanh(self.output(h))


class Agent(nn.Module):
    """Actor and twin critics, each with its target network."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim)
        widths = dict(primary_widths=args.primary_widths, dynamic_width=args.dynamic_width)
        self.critics = nn.ModuleList(
            make_critic(args.critic, obs_dim, action_dim, init=args.hyper_init, **widths)
            for _ in range(2)
        )
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.online = [*self.actor.parameters(), *self.critics.parameters()]  # θ
        self.targets = [*self.target_actor.parameters(), *self.target_critics.parameters()]  # θ'


class Batch(NamedTuple):
    """Transitions from the replay buffer."""

    obs: Tensor  # (B, obs)
    action: Tensor  # (B, action)
    reward: Tensor  # (B,)
    next_obs: Tensor  # (B, obs)
    terminated: Tensor  # (B,)


def q_value(critic: nn.Module, obs: Tensor, action: Tensor, args: Args) -> Tensor:
    """Q(s, a) (B,), float32 whatever the precision of the critic's matrix products."""
    with torch.autocast(obs.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
        return critic(obs, action)


def critic_loss(agent: Agent, batch: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Σ_i mean (Q_i(s, a) - y)² with y = r + γ (1 - terminated) min_i Q'_i(s', a').

    a' = clip(π'(s') + ε, ±1) with ε = clip(target_noise * noise, ±noise_clip); `noise` (B, action)
    is standard normal. Returns the loss and the mean Q_1(s, a).
    """
    obs, action, reward, next_obs, terminated = batch
    with torch.no_grad():
        epsilon = (args.target_noise * noise).clamp(-args.noise_clip, args.noise_clip)
        next_action = (agent.target_actor(next_obs) + epsilon).clamp(-1, 1)
        next_q1, next_q2 = (q_value(q, next_obs, next_action, args) for q in agent.target_critics)
        target = reward + args.gamma * (1 - terminated) * torch.min(next_q1, next_q2)  # (B,)
    q1, q2 = (q_value(q, obs, action, args) for q in agent.critics)
    return F.mse_loss(q1, target) + F.mse_loss(q2, target), q1.detach().mean()


def actor_loss(agent: Agent, batch: Batch, args: Args) -> Tensor:
    """-mean Q_1(s, π(s)), Eq. 5.

    With sa-hyper, w(s) does not depend on the action, so the gradient flows through the dynamic
    network alone (Fig. 2c). The critic is frozen during its forward pass, which is when
    autograd records what to differentiate, so that its primary network costs no backward pass.
    """
    critic = agent.critics[0].requires_grad_(False)
    loss = -q_value(critic, batch.obs, agent.actor(batch.obs), args).mean()
    critic.requires_grad_(True)
    return loss


def update_critics(agent: Agent, optimizers: dict, batch: Batch, noise: Tensor, args: Args) -> dict:
    """One step of both critics on `critic_loss`. Returns the loss and the mean Q_1(s, a)."""
    loss, mean_q = critic_loss(agent, batch, noise, args)
    optimizers["critic"].zero_grad()
    loss.backward()
    optimizers["critic"].step()
    return {"critic_loss": loss.detach(), "q_value": mean_q}


def update_actor_and_targets(agent: Agent, optimizers: dict, batch: Batch, args: Args) -> dict:
    """One step of the actor on `actor_loss`, and of all targets. Returns the loss."""
    loss = actor_loss(agent, batch, args)
    optimizers["actor"].zero_grad()
    loss.backward()
    optimizers["actor"].step()
    move_towards = torch.optim.swa_utils.get_ema_multi_avg_fn(decay=1 - args.tau)
    move_towards(agent.targets, agent.online, None)  # θ' <- θ' + τ (θ - θ')
    return {"actor_loss": loss.detach()}


class ReplayBuffer:
    """The last `capacity` transitions, one per row, so that a batch is a single gather."""

    def __init__(self, obs_dim: int, action_dim: int, capacity: int, device: str):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)
        self.data = torch.empty(capacity, sum(self.widths), device=device)
        self.added = 0

    def add(self, obs, action, reward: float, next_obs, terminated: bool) -> None:
        """Stores a transition; `next_obs` is the true next state, even where the episode ends."""
        row = np.concatenate((obs, action, (reward,), next_obs, (terminated,)), dtype=np.float32)
        self.data[self.added % len(self.data)] = torch.from_numpy(row)
        self.added += 1

    def sample(self, batch_size: int, rng: np.random.Generator) -> Batch:
        filled = min(self.added, len(self.data))
        index = torch.from_numpy(rng.integers(filled, size=batch_size))
        rows = self.data[index.to(self.data.device)]
        obs, action, reward, next_obs, terminated = rows.split(self.widths, -1)
        return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1))

    def state_dict(self) -> dict:
        return {"data": self.data[: self.added].clone(), "added": self.added}

    def load_state_dict(self, state: dict) -> None:
        self.data[: len(state["data"])] = state["data"]
        self.added = state["added"]


@torch.inference_mode()
def act(actor: Actor, obs: np.ndarray, device: str) -> np.ndarray:
    """π(s) for one observation: (obs,) -> (action,)"""
    return actor(torch.from_numpy(obs).to(device)).cpu().numpy()


def evaluate(actor: Actor, env: gym.Env, args: Args) -> list[tuple[float, int]]:
    """(return, length) of each episode of the deterministic policy, always from the same starts."""
    results, actor = [], copy.deepcopy(actor).cpu()  # for one observation faster than on a GPU
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=args.seed + 100 if episode == 0 else None)
        done = False
        while not done:
            obs, _, terminated, truncated, info = env.step(act(actor, obs, "cpu"))
            done = terminated or truncated
        results.append((info["totals"]["r"], info["totals"]["l"]))
    return results


def train(args: Args) -> None:
    env, eval_env = make_envs(args)
    run = Run(args, args.critic, args.total_timesteps, "global_step,episode,return,length")
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    torch.manual_seed(args.seed)  # initial weights
    rng = np.random.default_rng(args.seed)  # environment, exploration, batches, target noise
    agent = Agent(obs_dim, action_dim, args).to(args.device)
    adam = functools.partial(torch.optim.Adam, fused=True, capturable=args.cuda_graph)
    optimizers = {
        "critic": adam(agent.critics.parameters(), args.critic_lr),
        "actor": adam(agent.actor.parameters(), args.actor_lr),
    }
    learn_critics = functools.partial(update_critics, agent, optimizers, args=args)
    learn_actor = functools.partial(update_actor_and_targets, agent, optimizers, args=args)
    if args.cuda_graph:
        learn_critics, learn_actor = CudaGraph(learn_critics), CudaGraph(learn_actor)
    buffer = ReplayBuffer(obs_dim, action_dim, args.buffer_size, args.device)
    global_step = run.resume(rng, agent=agent, buffer=buffer, **optimizers)  # steps taken so far
    done = True

    while True:
        # Between two episodes there is no state of the simulator to save, so checkpoint here
        if done:
            run.save_checkpoint(global_step)
            obs, _ = env.reset(seed=int(rng.integers(2**31)))

        # Evaluate
        if global_step % args.eval_every == 0 or global_step == args.total_timesteps:
            episodes = evaluate(agent.actor, eval_env, args)
            eval_return, eval_length = np.mean(episodes, axis=0)
            rows = [(global_step, i, *episode) for i, episode in enumerate(episodes)]
            run.evaluated(global_step, rows, {"return": eval_return, "length": eval_length})
        run.save_networks(global_step, agent)
        if global_step == args.total_timesteps:
            break

        # Act: uniform at first, then a = clip(π(s) + ε, ±1) with ε ~ N(0, exploration_noise²)
        if global_step < args.learning_starts:
            action = rng.uniform(-1, 1, action_dim)
        else:
            epsilon = args.exploration_noise * rng.standard_normal(action_dim)
            action = (act(agent.actor, obs, args.device) + epsilon).clip(-1, 1)
        next_obs, reward, terminated, truncated, info = env.step(action.astype(np.float32))
        run.check_finite(global_step, reward=reward, observation=next_obs)
        buffer.add(obs, action, reward, next_obs, terminated)
        obs, done = next_obs, terminated or truncated
        if done:
            stats = {"episodic_return": info["totals"]["r"], "episodic_length": info["totals"]["l"]}
            run.log(global_step, "charts", stats)

        # Learn: the critics every step, actor and targets every `policy_frequency` steps
        if global_step >= args.learning_starts:
            batch = buffer.sample(args.batch_size, rng)
            noise = torch.from_numpy(rng.standard_normal(batch.action.shape, dtype=np.float32))
            losses = learn_critics(batch, noise.to(args.device))
            if (global_step + 1) % args.policy_frequency == 0:
                losses = losses | learn_actor(batch)
            losses = dict(zip(losses, torch.stack([*losses.values()]).tolist()))  # fetched together
            run.check_finite(global_step, **losses)
            if (global_step + 1) % (50 * args.policy_frequency) == 0:  # the actor moves in it, too
                run.log(global_step, "losses", losses)
        global_step += 1
        run.env_steps += 1
        run.bar.update()

    run.finish({"eval_return": eval_return})


# --------------------------------------------------------------------------------------------------
# TD3 and SAC end here. What other people's environments need is the same in both.


def make_envs(args: Args) -> tuple[gym.Env, gym.Env]:
    """One to train in and one to evaluate in, of which the second has made a step."""
    random.seed(args.seed)  # for those that draw from the global generators
    np.random.seed(args.seed % 2**32)
    env, eval_env = make_env(args), make_env(args)
    if env.spec.max_episode_steps is None:
        print("warning: no time limit: --env-kwargs max_episode_steps N sets one", file=sys.stderr)
    eval_env.reset(seed=args.seed)  # fail here, before a run directory is made
    eval_env.step(np.zeros(env.action_space.shape, np.float32))
    return env, eval_env


def make_env(args: Args, **kwargs) -> gym.Env:
    """The environment with actions in [-1, 1], float32 observations and rewards that are floats."""
    gym.logger.min_level = gym.logger.ERROR  # Gymnasium would warn that v4 is not the newest
    sys.path.append("")  # the current folder may hold the module of --env-id module:Name-v0
    try:
        env = gym.make(args.env_id, **args.env_kwargs, **kwargs)
        at_end.callback(env.close)
        if env.spec.id != args.env_id.split(":")[-1]:
            raise ValueError(f"give the version, the newest is {env.spec.id}")
        obs, action = env.observation_space, env.action_space
        flat = all(isinstance(s, gym.spaces.Box) and len(s.shape) == 1 for s in (obs, action))
        if not flat or not action.is_bounded() or action.dtype.kind != "f":
            raise ValueError(f"needs flat Boxes and bounded float actions, not {obs}, {action}")
        with np.errstate(all="ignore"):
            scale = 2 / (action.high - action.low)  # inf or 0 where that is 0 or overflows
        if not ((0 < scale) & (scale < np.inf)).all():
            raise ValueError(f"needs actions with bounds that are neither equal nor huge: {action}")
        env = gym.wrappers.TransformReward(env, to_float)
        env = gym.wrappers.RecordEpisodeStatistics(env, stats_key="totals")
        # A copy, since an environment may return the same array every time and change it in place
        env = gym.wrappers.TransformObservation(env, lambda obs: np.array(obs, np.float32), obs)
        # Clipped, since rescaling may leave the bounds by a rounding error
        env = gym.wrappers.TransformAction(
            env, lambda a: a.clip(action.low, action.high).astype(action.dtype), action
        )
        env = gym.wrappers.RescaleAction(env, -1.0, 1.0)
    except Exception as error:  # whatever the author of the environment raises
        trace = (error.__cause__ or error).__traceback__ or error.__traceback__
        last = traceback.extract_tb(trace)[-1]
        known = isinstance(error, gym.error.Error | ImportError) or last.filename == __file__
        where = "" if known else f" ({type(error).__name__} at {last.filename}:{last.lineno})"
        stop(f"--env-id {args.env_id} --env-kwargs {args.env_kwargs}: {error}{where}")
    return env


def to_float(reward) -> float:
    """Exits unless the reward is one number."""
    number = np.asarray(reward)
    if number.size != 1 or not isinstance(number.item(), (int, float)):
        stop(f"the environment's reward must be one number, not {reward!r}")
    return float(number.item())


def read_value(value):
    """The number, bool, None, tuple or dict that a string is in Python, else the string itself.

    true, false, none and inf may be in any case; a list becomes a tuple, also one from config.json.
    """
    names = {"true": "True", "false": "False", "none": "None", "inf": "1e999"}
    words = r"'[^']*'|\"[^\"]*\"|\w+"  # a quoted one stays as it is
    with contextlib.suppress(Exception):
        text = re.sub(words, lambda word: names.get(word[0].lower(), word[0]), value)
        json.dumps(read := ast.literal_eval(text))  # config.json must be able to hold it
        value = value if isinstance(read, str) else read
    return tuple(value) if isinstance(value, list) else value


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
