"""SAC with any of the eight critics of the hypernetwork paper (Sec. 5.2).

It is the SAC of Haarnoja et al., *Soft Actor-Critic Algorithms and Applications* (2018): two
critics, no value network, and a temperature that is tuned to a given entropy.

With `--critic sa-hyper` the Q-function is Q(s, a) = f_{w(s)}(a): a primary network turns the state
into the weights of a small dynamic network that acts on the action (Sec. 3). The actor follows the
gradient of Q in the action, which flows through the dynamic network alone (Fig. 2).

    python sac_hyper.py --env-id Hopper-v4 --critic sa-hyper

In the help, (paper) marks a value of the paper and (released) one of the authors' code.
"""

import contextlib
import copy
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, NoReturn
from zipfile import BadZipFile, ZipFile

import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hypernet import CRITICS, make_critic


@dataclass
class Args:
    """SAC with hypernetwork critics."""

    env_id: str = "Hopper-v4"
    """Gymnasium environment with a flat Box of observations and a bounded Box of actions
    (paper: Hopper, Walker2d, Ant, HalfCheetah)"""
    env_kwargs: str = "{}"
    """keyword arguments of the environment as JSON; for Ant, whose control cost the paper reduces
    as PEARL does: '{"ctrl_cost_weight": 0.005}'"""
    seed: int = 1
    """seed of network weights, environment, exploration and batches (paper: 5 seeds)"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole run; a larger number extends a run (released)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and replay buffer live; auto takes cuda where there is one"""
    runs_dir: str = "runs"
    """the run goes to RUNS_DIR/EXP_NAME/ENV_ID/CRITIC/seedSEED"""
    exp_name: str = "sac_hyper"
    """name of the experiment, a part of the run directory"""
    eval_every: int = 5_000
    """environment steps between two evaluations, the first at step 0 (released)"""
    eval_episodes: int = 10
    """episodes of one evaluation, with the deterministic policy (released)"""
    checkpoint_every: int = 5_000
    """environment steps between two checkpoints, each taken at the next end of an episode"""
    save_every: int = 0
    """environment steps between two step_N.pt, the networks alone; 0 saves the last one only"""
    capture_video: bool = False
    """write the first episode of each evaluation to videos/ in the run directory"""
    track: bool = False
    """send the TensorBoard scalars to Weights & Biases too (needs: pip install wandb)"""
    overwrite: bool = False
    """delete what the run directory holds and start afresh"""

    critic: Literal[CRITICS] = "sa-hyper"
    """Q-network (paper, Sec. 5.2)"""
    primary_widths: tuple[int, ...] = (256, 512, 1024)
    """widths of the primary network, for sa-hyper, as-hyper and resnet-features (released)"""
    dynamic_width: int = 256
    """hidden units of the dynamic network (paper, Sec. 2)"""
    hyper_init: Literal["released", "paper", "bias"] = "released"
    """start of the dynamic weights: released, the small constants of the authors' code; paper, like
    Kaiming-uniform; bias, one ordinary network for every input (measured: results/)"""
    learning_starts: int = 1_000
    """environment steps with uniformly random actions before learning (released, where learning
    starts already at 256)"""
    batch_size: int = 256
    """transitions of one update (released)"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds (released)"""
    gamma: float = 0.99
    """discount factor (released)"""
    tau: float = 0.005
    """share of the critics that moves into their targets at each update (released)"""
    actor_lr: float = 3e-4
    """Adam's learning rate for the actor (released)"""
    critic_lr: float | None = None
    """Adam's learning rate for the critics; None is 5e-5 for sa-hyper and as-hyper, 3e-4 for the
    others (released)"""
    alpha_lr: float = 3e-4
    """Adam's learning rate for the temperature (released)"""
    autotune: bool = True
    """tune the temperature to a policy entropy of minus the number of action dimensions, actions in
    half widths of their range (Haarnoja et al., 2018; the paper does not say); without it stays at
    ALPHA"""
    alpha: float = 0.2
    """the temperature with --no-autotune (released, in its example commands)"""


# The least value of each number.
AT_LEAST = {
    0: "seed save_every learning_starts actor_lr critic_lr alpha_lr alpha",
    1: "total_timesteps eval_every eval_episodes checkpoint_every dynamic_width batch_size "
    "buffer_size",
}


def stop(message: str, code: int = 2) -> NoReturn:
    """Say on stderr in one line why it ends here: code 2 for bad use, 1 for a run gone wrong."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def parse_args() -> Args:
    """The command line's arguments, checked, with `device` and `critic_lr` filled in."""
    box = io.StringIO()  # tyro draws an error as a box of several lines
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as end:
        if end.code:
            stop(box.getvalue().split("╮\n")[-1].split("│ ──")[0].replace("│", " "))
        raise
    for least, names in AT_LEAST.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not least <= value < math.inf:
                stop(f"--{name.replace('_', '-')} {value}: must be a number of at least {least}")
    for name in ("gamma", "tau"):
        if not 0 <= getattr(args, name) <= 1:
            stop(f"--{name} {getattr(args, name)}: must be in [0, 1]")
    if args.learning_starts >= args.total_timesteps:
        stop(f"--learning-starts {args.learning_starts}: must be below --total-timesteps")
    if args.seed >= 2**32:
        stop(f"--seed {args.seed}: must be below 2**32")
    if not args.primary_widths or min(args.primary_widths) < 1:
        stop("--primary-widths: must be one or more integers of at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: PyTorch finds no CUDA device here, use --device cpu")
    if args.track and importlib.util.find_spec("wandb") is None:
        stop("--track: Weights & Biases is not installed, run: pip install wandb")
    if args.capture_video and sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.critic_lr is None:
        args.critic_lr = 5e-5 if args.critic in ("sa-hyper", "as-hyper") else 3e-4
    return args


def fast_matmul() -> None:
    """Send float32 matrix products on the CPU to oneDNN: MKL is slow on AMD (README, Speed).

    The setting allows oneDNN to round to bfloat16, which it does where the processor has AMX; there
    it is taken back.
    """
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    a = torch.linspace(-1, 1, 256 * 256).view(256, 256)
    if ((a @ a).double() - a.double() @ a.double()).abs().max() > 1e-3:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"


# Arguments that cannot change the result: a run may be resumed with others.
FREE_ARGS = ("runs_dir", "checkpoint_every", "save_every", "capture_video", "track", "overwrite")


def claim_run(args: Args) -> tuple[Path, filelock.FileLock]:
    """Lock the run directory for this process and write its config.json.

    Ends here if the run is complete, belongs to other arguments, or is alive in another process.
    """
    run_dir = Path(args.runs_dir, args.exp_name, args.env_id, args.critic, f"seed{args.seed}")
    config_file, summary_file = run_dir / "config.json", run_dir / "summary.json"
    packages = ("torch", "gymnasium", "mujoco", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions["threads"] = torch.get_num_threads()
    config = {"args": dataclasses.asdict(args), "versions": versions, "git_commit": git_commit()}
    config = json.loads(json.dumps(config))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / ".lock", blocking=False)
        lock.acquire()
    except filelock.Timeout:
        stop(f"another process is training in {run_dir}")
    except OSError as error:
        stop(f"--runs-dir {args.runs_dir}: cannot write there: {error}")
    if args.overwrite:
        order = {"summary.json": -1, "config.json": 1}  # so that no crash leaves a false trace
        for file in sorted(run_dir.iterdir(), key=lambda file: order.get(file.name, 0)):
            if file.name != ".lock":
                shutil.rmtree(file) if file.is_dir() else file.unlink()
    elif config_file.exists() or list(run_dir.glob("checkpoint*.pt")):
        try:
            old_config = json.loads(config_file.read_text())
            old, old_versions = old_config["args"], dict(old_config["versions"])
            extended = old["total_timesteps"] < config["args"]["total_timesteps"]
        except (OSError, ValueError, KeyError, TypeError):
            stop(f"{config_file} is missing or damaged; --overwrite starts afresh")
        new = config["args"]
        differ = [name for name in new if name not in FREE_ARGS and old.get(name) != new[name]]
        if extended and "total_timesteps" in differ:
            differ.remove("total_timesteps")
        if differ:
            fields = ", ".join(f"{name} was {old.get(name)} and is {new[name]}" for name in differ)
            stop(f"{run_dir} holds a run with other arguments: {fields}; --overwrite starts afresh")
        if extended:
            summary_file.unlink(missing_ok=True)
        if summary_file.exists():
            print(f"{run_dir} is complete")
            sys.exit(0)
        differ = [name for name in versions if old_versions.get(name) != versions[name]]
        if differ:
            now = ", ".join(f"{n} was {old_versions.get(n)} and is {versions[n]}" for n in differ)
            print(f"warning: {run_dir} will not repeat bit for bit: {now}", file=sys.stderr)
    write(config_file, json.dumps(config, indent=2) + "\n")
    return run_dir, lock


def track(run_dir: Path, args: Args) -> None:
    """Send what TensorBoard gets to Weights & Biases; a resumed run goes on there."""
    import wandb

    name = "-".join(run_dir.parts[-4:])
    options = dict(id=name, name=name, resume="allow", dir=run_dir, sync_tensorboard=True)
    wandb.init(project="hypernets", config=vars(args), **options)


def git_commit() -> str | None:
    """The commit of this file's checkout, or None."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write(file: Path, content: str | dict) -> None:
    """Replace a file (text or `torch.save`): a crash or a full disk leaves the old one whole."""
    aside = file.with_name(file.name + ".tmp")
    try:
        with open(aside, "wb") as stream:
            if isinstance(content, str):
                stream.write(content.encode())
            else:
                torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        stop(f"cannot write {file}: {error.__context__ or error}", code=1)


def thread_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own; on a full disk the run ends there too."""
    if not isinstance(failure.exc_value, OSError):
        return threading.__excepthook__(failure)
    print(
        f"error: cannot write TensorBoard's events: {failure.exc_value}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def save_checkpoint(run_dir: Path, state: dict) -> None:
    """Write checkpoint.pt and keep the one before; at every moment one of the two is whole."""
    newest, previous = run_dir / "checkpoint.pt", run_dir / "checkpoint.prev.pt"
    write(run_dir / "checkpoint.new.pt", state)
    if newest.exists():
        os.replace(newest, previous)
    os.replace(run_dir / "checkpoint.new.pt", newest)


# What reading a damaged file raises.
LOAD_ERRORS = (OSError, EOFError, KeyError, ValueError, RuntimeError, BadZipFile, UnpicklingError)


def load_checkpoint(run_dir: Path) -> dict | None:
    """The newest whole checkpoint, None if there is none at all."""
    newest, previous = run_dir / "checkpoint.pt", run_dir / "checkpoint.prev.pt"
    files = [file for file in (newest, previous) if file.exists()]
    for file in files:
        try:
            if ZipFile(file).testzip():
                raise BadZipFile("wrong checksum")
            state = torch.load(file, map_location="cpu", weights_only=True)
        except LOAD_ERRORS as error:
            print(f"warning: {file} is damaged ({error})", file=sys.stderr)
            continue
        if file == previous:
            os.replace(previous, newest)
        return state
    if files:
        stop(f"no whole checkpoint in {run_dir}, nothing was changed; --overwrite starts afresh")
    return None


def check_finite(global_step: int, **quantities) -> None:
    """Stop the run, exit code 1, if a reward, an observation or a loss is not finite."""
    for name, value in quantities.items():
        if not np.isfinite(value).all():
            stop(f"{name} is not finite at step {global_step}", code=1)


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The environment of `--env-id`; ends here if there is none or the agent cannot act in it."""
    gym.logger.min_level = gym.logger.ERROR  # v4 is not the newest version, and meant
    try:
        kwargs = dict(json.loads(args.env_kwargs))
    except (ValueError, TypeError):
        stop(f"--env-kwargs {args.env_kwargs}: must be a JSON object like '{{\"name\": 0.5}}'")
    try:
        env = gym.make(args.env_id, render_mode=render_mode, **kwargs)
        if render_mode:
            env.reset()
            env.render()
    except Exception as error:
        name, _, version = args.env_id.rpartition("-v")
        newer = [f"{name}-v{n}" for n in (4, 5) if f"{name}-v{n}" in gym.registry]
        similar = difflib.get_close_matches(args.env_id, gym.registry, n=1)
        if version in ("1", "2", "3") and newer:
            stop(f"--env-id {args.env_id}: no longer in Gymnasium, use {' or '.join(newer)}")
        if args.env_id not in gym.registry and similar:
            stop(f"--env-id {args.env_id}: unknown, did you mean {similar[0]}?")
        stop(f"--env-id {args.env_id} --env-kwargs {args.env_kwargs}: {error}")
    obs, action = env.observation_space, env.action_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        stop(f"--env-id {args.env_id}: observations must be a flat Box, not {obs}")
    if not isinstance(action, gym.spaces.Box) or len(action.shape) != 1 or not action.is_bounded():
        stop(f"--env-id {args.env_id}: actions must be a flat, bounded Box, not {action}")
    return env


class Actor(nn.Module):
    """Tanh-Gaussian policy: a = low + half_width * (1 + tanh(u)), u ~ N(mean(s), std(s)²)."""

    def __init__(self, obs_dim: int, action_space: gym.spaces.Box):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, 2 * action_space.shape[0]),
        )
        low = torch.as_tensor(action_space.low, dtype=torch.float32)
        high = torch.as_tensor(action_space.high, dtype=torch.float32)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("half_width", (high - low) / 2)

    def squash(self, u: Tensor) -> Tensor:
        return (self.low + self.half_width * (1 + torch.tanh(u))).clamp(self.low, self.high)

    def forward(self, obs: Tensor) -> Tensor:
        """The deterministic action, tanh(mean) scaled: obs (..., obs) -> action (..., action)"""
        mean, _ = self.net(obs).chunk(2, -1)
        return self.squash(mean)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """a = μ(ε|s), Eq. 4, for standard normal noise ε (..., action), and log π(a|s) (...).

        log π(a) = log N(u; mean, std²) - Σ log(half_width (1 - tanh²(u))), where
        log(1 - tanh²(u)) = 2 (log 2 - u - softplus(-2u)) stays exact near the bounds.
        """
        mean, log_std = self.net(obs).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u)) + self.half_width.log()
        return self.squash(u), (log_normal - log_slope).sum(-1)


class Agent(nn.Module):
    """Actor, temperature, and twin critics with their targets."""

    def __init__(self, obs_dim: int, action_space: gym.spaces.Box, args: Args):
        super().__init__()
        hyper = (args.primary_widths, args.dynamic_width, args.hyper_init)
        dims = (obs_dim, action_space.shape[0])
        self.actor = Actor(obs_dim, action_space)
        self.critics = nn.ModuleList(make_critic(args.critic, *dims, *hyper) for _ in range(2))
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.online = [*self.critics.parameters()]  # θ
        self.targets = [*self.target_critics.parameters()]  # θ'
        alpha = torch.tensor(1.0 if args.autotune else args.alpha)
        self.log_alpha = nn.Parameter(alpha.log(), requires_grad=args.autotune)


class ReplayBuffer:
    """The last `capacity` transitions, a row each, so that a batch is a single gather."""

    def __init__(self, obs_dim: int, action_dim: int, capacity: int, device: str):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)
        self.data = torch.empty(capacity, sum(self.widths), device=device)
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, len(self.data))

    def add(self, obs, action, reward: float, next_obs, terminated: bool) -> None:
        """Store a transition; `next_obs` is what `action` led to, also where that truncated."""
        row = np.concatenate((obs, action, (reward,), next_obs, (terminated,)), dtype=np.float32)
        self.data[self.added % len(self.data)] = torch.from_numpy(row)
        self.added += 1

    def sample(self, batch_size: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """obs (B, obs), action (B, action), reward (B,), next_obs (B, obs), terminated (B,)"""
        index = torch.from_numpy(rng.integers(len(self), size=batch_size))
        rows = self.data[index.to(self.data.device)]
        obs, action, reward, next_obs, terminated = rows.split(self.widths, -1)
        return obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1)

    def state_dict(self) -> dict:
        return {"data": self.data[: len(self)].clone(), "added": self.added}

    def load_state_dict(self, state: dict) -> None:
        self.data[: len(state["data"])] = state["data"]
        self.added = state["added"]


@torch.inference_mode()
def act(actor: Actor, obs: np.ndarray) -> np.ndarray:
    """π(s) of one observation: (obs,) -> (action,)"""
    obs = torch.as_tensor(obs, dtype=torch.float32, device=actor.low.device)
    return actor(obs).cpu().numpy()


@torch.inference_mode()
def explore(actor: Actor, obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """a ~ π(.|s) for one observation: (obs,), (action,) -> (action,)"""
    obs, noise = (
        torch.as_tensor(x, dtype=torch.float32, device=actor.low.device) for x in (obs, noise)
    )
    return actor.sample(obs, noise)[0].cpu().numpy()


def evaluate(actor: Actor, env: gym.Env, seed: int, episodes: int) -> list[tuple[float, int]]:
    """(return, length) of each episode of the deterministic policy, from the same starts always."""
    results = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        episode_return, length, done = 0.0, 0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(act(actor, obs))
            episode_return += float(reward)
            length += 1
            done = terminated or truncated
        results.append((episode_return, length))
    return results


def record_video(actor: Actor, args: Args, folder: Path, name: str) -> None:
    """The first episode of an evaluation as folder/{name}-episode-0.mp4."""
    env = make_env(args, render_mode="rgb_array")
    env = gym.wrappers.RecordVideo(env, str(folder), name_prefix=name)
    evaluate(actor, env, args.seed + 100, episodes=1)
    env.close()


def critic_loss(agent: Agent, batch: tuple[Tensor, ...], noise: Tensor, args: Args) -> Tensor:
    """Σ_i mean (Q_i(s, a) - y)², y = r + γ (1 - terminated) (min_i Q'_i(s', a') - α log π(a'|s')).

    a' ~ π(.|s') is sampled with `noise` (B, action), standard normal.
    """
    obs, action, reward, next_obs, terminated = batch
    with torch.no_grad():
        next_action, log_prob = agent.actor.sample(next_obs, noise)
        next_q = torch.min(*(critic(next_obs, next_action) for critic in agent.target_critics))
        next_value = next_q - agent.log_alpha.exp() * log_prob
        target = reward + args.gamma * (1 - terminated) * next_value  # (B,)
    return sum(F.mse_loss(critic(obs, action), target) for critic in agent.critics)


def actor_loss(agent: Agent, batch: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
    """mean (α log π(a|s) - min_i Q_i(s, a)) with a = μ(ε|s), Eq. 5, and the detached log π(a|s).

    The critics are frozen before their forward pass: with sa-hyper nothing of a primary network is
    kept for the backward pass, and the gradient flows through the dynamic network alone (Fig. 2c).
    """
    obs = batch[0]
    action, log_prob = agent.actor.sample(obs, noise)
    agent.critics.requires_grad_(False)
    q = torch.min(*(critic(obs, action) for critic in agent.critics))
    agent.critics.requires_grad_(True)
    return (agent.log_alpha.exp().detach() * log_prob - q).mean(), log_prob.detach()


def alpha_loss(agent: Agent, log_prob: Tensor) -> Tensor:
    """mean -α (log π(a|s) + H): α grows while the entropy is below H.

    H = -|A| for actions in half widths of their range, hence Σ log half_width - |A| for log π.
    """
    target_entropy = (agent.actor.half_width.log() - 1).sum()
    return -(agent.log_alpha.exp() * (log_prob + target_entropy)).mean()


def update(
    agent: Agent,
    optimizers: dict[str, torch.optim.Optimizer],
    batch: tuple[Tensor, ...],
    noise: Tensor,
    args: Args,
) -> dict[str, Tensor]:
    """One step of critics, actor, temperature and targets; the losses. noise: (2, B, action)"""
    losses = {"critic_loss": critic_loss(agent, batch, noise[0], args)}
    optimizers["critic_optimizer"].zero_grad()
    losses["critic_loss"].backward()
    optimizers["critic_optimizer"].step()
    losses["actor_loss"], log_prob = actor_loss(agent, batch, noise[1])
    optimizers["actor_optimizer"].zero_grad()
    losses["actor_loss"].backward()
    optimizers["actor_optimizer"].step()
    if args.autotune:
        losses["alpha_loss"] = alpha_loss(agent, log_prob)
        optimizers["alpha_optimizer"].zero_grad()
        losses["alpha_loss"].backward()
        optimizers["alpha_optimizer"].step()
        losses["alpha"] = agent.log_alpha.detach().exp()
    with torch.no_grad():
        torch._foreach_lerp_(agent.targets, agent.online, args.tau)  # θ' <- θ' + τ (θ - θ')
    return losses


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is a crash like any other
    args = parse_args()
    env, eval_env = make_env(args), make_env(args)
    if args.capture_video:
        make_env(args, render_mode="rgb_array").close()  # or say now what is missing
    run_dir, lock = claim_run(args)
    checkpoint = load_checkpoint(run_dir)
    fast_matmul()

    torch.manual_seed(args.seed)  # initial weights
    rng = np.random.default_rng(args.seed)  # environment, exploration, batches, target noise
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    low, high = env.action_space.low, env.action_space.high
    agent = Agent(obs_dim, env.action_space, args).to(args.device)
    optimizers = {
        "critic_optimizer": torch.optim.Adam(
            agent.critics.parameters(), args.critic_lr, fused=True
        ),
        "actor_optimizer": torch.optim.Adam(agent.actor.parameters(), args.actor_lr, fused=True),
        "alpha_optimizer": torch.optim.Adam([agent.log_alpha], args.alpha_lr, fused=True),
    }
    buffer = ReplayBuffer(obs_dim, action_dim, args.buffer_size, args.device)
    parts = {"agent": agent, "buffer": buffer} | optimizers
    global_step, eval_csv = 0, "global_step,episode,return,length\n"
    if checkpoint:
        global_step, eval_csv = checkpoint["global_step"], checkpoint["eval_csv"]
        rng.bit_generator.state = checkpoint["rng"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        write(run_dir / "eval.csv", eval_csv)
    print(f"{'resuming' if checkpoint else 'starting'} {run_dir} at step {global_step}", flush=True)
    if args.track:
        track(run_dir, args)
    threading.excepthook = thread_failed
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if checkpoint else 0)
    del checkpoint  # a replay buffer's memory
    terminal = sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")
    bar = tqdm(initial=global_step, total=args.total_timesteps, smoothing=0, file=terminal)
    checkpoint_step, done = global_step, True

    while True:
        if done:  # between two episodes: no simulator state to keep
            due = checkpoint_step + args.checkpoint_every
            if global_step >= due or global_step == args.total_timesteps:
                writer.flush()
                counters = {"global_step": global_step, "eval_csv": eval_csv}
                counters |= {"rng": rng.bit_generator.state}
                states = {name: part.state_dict() for name, part in parts.items()}
                save_checkpoint(run_dir, states | counters)
                del states
                checkpoint_step = global_step
            obs, _ = env.reset(seed=int(rng.integers(2**31)))
            episode_return, episode_length = 0.0, 0

        if global_step % args.eval_every == 0:
            episodes = evaluate(agent.actor, eval_env, args.seed + 100, args.eval_episodes)
            eval_return, eval_length = np.mean(episodes, axis=0)
            check_finite(global_step, evaluation_return=eval_return)
            for episode, result in enumerate(episodes):
                eval_csv += "{},{},{},{}\n".format(global_step, episode, *result)
            write(run_dir / "eval.csv", eval_csv)
            writer.add_scalar("eval/return", eval_return, global_step)
            writer.add_scalar("eval/length", eval_length, global_step)
            sps = (global_step - bar.initial) / bar.format_dict["elapsed"]
            writer.add_scalar("charts/SPS", sps, global_step)
            bar.set_postfix_str(f"eval return {eval_return:.1f}")
            if terminal is not sys.stderr:
                print(bar, flush=True)
            if args.capture_video:
                record_video(agent.actor, args, run_dir / "videos", f"step_{global_step}")
        if args.save_every and global_step % args.save_every == 0:
            write(run_dir / f"step_{global_step}.pt", agent.state_dict())
        if global_step == args.total_timesteps:
            break

        # Act: a ~ π(.|s)
        if global_step < args.learning_starts:
            action = rng.uniform(low, high)
        else:
            action = explore(agent.actor, obs, rng.standard_normal(action_dim))
        next_obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        global_step += 1
        check_finite(global_step, reward=reward, observation=next_obs)
        buffer.add(obs, action, reward, next_obs, terminated)
        obs, done = next_obs, terminated or truncated
        episode_return, episode_length = episode_return + reward, episode_length + 1

        # Learn: critics, actor, temperature and targets every step
        losses = {}
        if global_step > args.learning_starts:
            batch = buffer.sample(args.batch_size, rng)
            noise = rng.standard_normal((2, args.batch_size, action_dim), dtype=np.float32)
            noise = torch.from_numpy(noise).to(args.device)
            losses = update(agent, optimizers, batch, noise, args)
            values = torch.stack([*losses.values()]).tolist()  # one host sync
            losses = dict(zip(losses, values))
            check_finite(global_step, **losses)

        bar.update()
        if done:
            writer.add_scalar("charts/episodic_return", episode_return, global_step)
            writer.add_scalar("charts/episodic_length", episode_length, global_step)
            for name, loss in losses.items():
                writer.add_scalar(f"losses/{name}", loss, global_step)

    write(run_dir / f"step_{global_step}.pt", agent.state_dict())
    writer.close()
    last = [row.split(",") for row in eval_csv.splitlines()[-args.eval_episodes :]]
    summary = {"global_step": global_step, "eval_step": int(last[0][0])}
    summary["eval_return"] = np.mean([float(row[2]) for row in last])
    write(run_dir / "summary.json", json.dumps(summary) + "\n")  # last: the run is complete
    print(f"{run_dir} is complete")
    lock.release()
