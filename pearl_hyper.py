"""PEARL (Rakelly et al., 2019) with MLPs or with the hypernetworks of the paper (Secs. 3 and 4).

An encoder turns transitions of a task, the context c, into a distribution of a latent z, q(z|c); a
soft actor-critic learns Q(s, a, z), V(s, z) and π(a|s, z) off-policy. With `--model hyper` the
state makes the critics' weights, Q = f_{w(s)}(a, z) and V = f_{w(s)}(z), the latent makes those of
the policy, π_{w(z)}(a|s): z is a base variable of the critics, the meta variable of the policy.

    python pearl_hyper.py --env-id HalfCheetahVelMedium-v0 --model hyper

In the help, (paper) marks a value of the paper and (released) one of the authors' code.
"""

import contextlib
import copy
import dataclasses
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
from typing import Literal, NamedTuple, NoReturn
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

from hypernet import HyperNetwork
from meta_envs import FAMILIES, MetaVectorEnv, sample_goals


@dataclass
class Args:
    """PEARL with hypernetworks. The defaults are the paper's run."""

    env_id: str = "HalfCheetahVelMedium-v0"
    """family of tasks (paper: HalfCheetahFwdBack, AntFwdBack, HalfCheetahVel, AntVel,
    HalfCheetahVelMedium, all -v0)"""
    seed: int = 1
    """seed of goals, network weights, environments, noise and batches (paper: 5 seeds)"""
    num_iterations: int = 400
    """collections of data, each with its updates; a larger number extends a run (released)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and replay buffers live; auto takes cuda where there is one"""
    runs_dir: str = "runs"
    """the run goes to RUNS_DIR/EXP_NAME/ENV_ID/MODEL/seedSEED, MODEL-oracle with the oracle"""
    exp_name: str = "pearl_hyper"
    """name of the experiment, a part of the run directory"""
    eval_every: int = 1
    """iterations between two evaluations, the first before any training (released: after an
    iteration)"""
    eval_episodes: int | None = None
    """trajectories a goal that are scored, each after two of its own that gather context; None is
    the family's (released)"""
    checkpoint_every: int = 1
    """iterations between two checkpoints"""
    save_every: int = 0
    """iterations between two step_N.pt, the networks alone; 0 saves the last one only"""
    capture_video: bool = False
    """write a trajectory of the first test goal to videos/ in the run directory, each evaluation"""
    track: bool = False
    """send the TensorBoard scalars to Weights & Biases too (needs: pip install wandb)"""
    overwrite: bool = False
    """delete what the run directory holds and start afresh"""

    model: Literal["mlp", "hyper"] = "hyper"
    """networks of policy and critics: three layers of 300, or hypernetworks (paper, Sec. 4)"""
    context: Literal["learned", "oracle"] = "learned"
    """the latent z: sampled from the encoder's posterior, or the goal itself, with no encoder and
    nothing to adapt (released, where velocities are scaled to [0, 1])"""
    primary_widths: tuple[int, ...] = (256, 512, 1024)
    """widths of the primary networks of hyper (released)"""
    dynamic_width: int = 256
    """hidden units of the dynamic networks of hyper (paper, Sec. 2)"""
    hyper_init: Literal["released", "paper", "bias"] = "released"
    """start of the dynamic weights of hyper (paper, Sec. 5.2): released, the small constants of the
    authors' code; paper, like Kaiming-uniform; bias, one ordinary network for every input"""
    latent_dim: int = 5
    """dimensions of the learned z (released)"""
    kl_weight: float = 0.1
    """weight of the KL divergence from the prior, a sum over tasks and dimensions (released)"""
    num_train_goals: int | None = None
    """tasks to train on, drawn once from the seed; None is the family's (released)"""
    num_test_goals: int | None = None
    """tasks to evaluate on, drawn once from the seed, and as many of the train goals, the first;
    None is the family's (released, where the train goals are drawn anew each time)"""
    num_initial_steps: int = 2000
    """environment steps a train task with z from the prior before any training (released)"""
    num_collect_goals: int = 5
    """train tasks that an iteration collects data from, drawn with replacement (released)"""
    num_prior_steps: int | None = None
    """environment steps a task and iteration with z from the prior, in whole trajectories; the
    encoder learns from a task's latest alone, before its first from the initial ones; None is the
    family's (released)"""
    num_posterior_steps: int | None = None
    """the same with z from the posterior; None is the family's (released)"""
    num_train_steps: int | None = None
    """updates of an iteration; None is the family's (released)"""
    meta_batch_size: int | None = None
    """train tasks of an update, drawn with replacement; None is the family's (released)"""
    batch_size: int = 256
    """transitions a task of an update (released)"""
    context_batch_size: int | None = None
    """transitions a task that the encoder sees in an update and before a trajectory with z from the
    posterior; None is the family's (released)"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds of each task; it grows as they come (released)"""
    horizon: int = 200
    """environment steps of a trajectory (released)"""
    gamma: float = 0.99
    """discount factor (released)"""
    tau: float = 0.005
    """share of V that moves into its target at each update (released)"""
    reward_scale: float = 5.0
    """factor of the rewards in the critic's target; the temperature is 1 (released)"""
    policy_reg: float = 1e-3
    """weight of the mean square of the policy's mean, and of its log_std, in its loss (released)"""
    critic_lr: float | None = None
    """Adam's learning rate for Q and V; None is 5e-5 for hyper, 3e-4 for mlp (released)"""
    policy_lr: float | None = None
    """Adam's learning rate for the policy; None is 1e-4 for hyper, 3e-4 for mlp (released)"""
    encoder_lr: float = 3e-4
    """Adam's learning rate for the encoder (released)"""


# The least value of each number.
AT_LEAST = {
    0: "seed save_every kl_weight num_posterior_steps reward_scale policy_reg critic_lr policy_lr "
    "encoder_lr",
    1: "num_iterations eval_every eval_episodes checkpoint_every dynamic_width latent_dim "
    "num_train_goals num_test_goals num_initial_steps num_collect_goals num_prior_steps "
    "num_train_steps meta_batch_size batch_size context_batch_size buffer_size horizon",
}

# What None stands for in Args (released).
# fmt: off
FAMILY_ARGS = ("num_train_goals", "num_test_goals", "meta_batch_size", "context_batch_size",
               "num_prior_steps", "num_posterior_steps", "num_train_steps", "eval_episodes")
FAMILY_DEFAULTS = {
    "HalfCheetahFwdBack-v0":   (2,   2,  4,  256, 1000, 1000, 2000, 4),
    "AntFwdBack-v0":           (2,   2,  4,  256, 400,  600,  4000, 2),
    "HalfCheetahVel-v0":       (100, 30, 16, 100, 400,  600,  2000, 1),
    "AntVel-v0":               (100, 30, 16, 100, 400,  600,  2000, 1),
    "HalfCheetahVelMedium-v0": (100, 30, 16, 100, 400,  600,  2000, 1),
}
# fmt: on


def stop(message: str, code: int = 2) -> NoReturn:
    """Say on stderr in one line why it ends here: code 2 for bad use, 1 for a run gone wrong."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def parse_args() -> Args:
    """The command line's arguments, checked, with everything that may be None filled in."""
    box = io.StringIO()  # tyro draws an error as a box of several lines
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as end:
        if end.code:
            stop(box.getvalue().split("╮\n")[-1].split("│ ──")[0].replace("│", " "))
        raise
    if args.env_id not in FAMILIES:
        stop(f"--env-id {args.env_id}: unknown, choose from {', '.join(FAMILIES)}")
    for least, names in AT_LEAST.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not least <= value < math.inf:
                stop(f"--{name.replace('_', '-')} {value}: must be a number of at least {least}")
    for name in ("gamma", "tau"):
        if not 0 <= getattr(args, name) <= 1:
            stop(f"--{name} {getattr(args, name)}: must be in [0, 1]")
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
    defaults = dict(zip(FAMILY_ARGS, FAMILY_DEFAULTS[args.env_id]))
    defaults["critic_lr"] = 5e-5 if args.model == "hyper" else 3e-4
    defaults["policy_lr"] = 1e-4 if args.model == "hyper" else 3e-4
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
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
    model = args.model if args.context == "learned" else f"{args.model}-{args.context}"
    run_dir = Path(args.runs_dir, args.exp_name, args.env_id, model, f"seed{args.seed}")
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
            extended = old["num_iterations"] < config["args"]["num_iterations"]
        except (OSError, ValueError, KeyError, TypeError):
            stop(f"{config_file} is missing or damaged; --overwrite starts afresh")
        new = config["args"]
        differ = [name for name in new if name not in FREE_ARGS and old.get(name) != new[name]]
        if extended and "num_iterations" in differ:
            differ.remove("num_iterations")
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


def check_finite(iteration: int, **quantities) -> None:
    """Stop the run, exit code 1, if one of the quantities is not finite."""
    for name, value in quantities.items():
        if not np.isfinite(value).all():
            stop(f"{name} is not finite at iteration {iteration}", code=1)


def make_mlp(*widths: int, output: float = 3e-3) -> nn.Sequential:
    """Linear layers with relu between them, (..., widths[0]) -> (..., widths[-1]).

    Hidden weights start uniform in ±1 / sqrt(fan_out), hidden biases at 0.1, the last layer uniform
    in ±output (released).
    """
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.uniform_(linear.weight, -(fan_out**-0.5), fan_out**-0.5)
        nn.init.constant_(linear.bias, 0.1)
        layers += [linear, nn.ReLU()]
    nn.init.uniform_(linear.weight, -output, output)
    nn.init.uniform_(linear.bias, -output, output)
    return nn.Sequential(*layers[:-1])


class Critic(nn.Module):
    """Q(s, a, z) of base [a, z], or V(s, z) of base z: obs (T, N, obs), base (T, N, x) -> (T, N).

    The state is the meta variable of hyper: the same weights for all tasks (paper, end of Sec. 3).
    """

    def __init__(self, obs_dim: int, base_dim: int, args: Args):
        super().__init__()
        self.model = args.model
        if self.model == "hyper":
            hyper = (args.dynamic_width, args.primary_widths, args.hyper_init)
            self.net = HyperNetwork(obs_dim, base_dim, 1, *hyper)
        else:
            self.net = make_mlp(obs_dim + base_dim, 300, 300, 300, 1)

    def forward(self, obs: Tensor, *base: Tensor) -> Tensor:
        base = torch.cat(base, -1)
        if self.model == "hyper":
            return self.net(obs, base).squeeze(-1)
        return self.net(torch.cat([obs, base], -1)).squeeze(-1)


class Policy(nn.Module):
    """Tanh-Gaussian policies of T tasks: a = tanh(u), u ~ N(mean(s, z), std(s, z)²).

    The latent is the meta variable of hyper: the weights of a task's policy are generated once for
    all its states (paper, Sec. 4). The actions of all families are in [-1, 1].
    """

    def __init__(self, obs_dim: int, action_dim: int, latent_dim: int, args: Args):
        super().__init__()
        self.model = args.model
        if self.model == "hyper":
            hyper = (args.dynamic_width, args.primary_widths, args.hyper_init)
            self.net = HyperNetwork(latent_dim, obs_dim, 2 * action_dim, *hyper)
        else:
            self.net = make_mlp(obs_dim + latent_dim, 300, 300, 300, 2 * action_dim, output=1e-3)

    def generate(self, z: Tensor):
        """What is the same for all states of a task: dynamic weights, or z itself, (T, z)."""
        return self.net.generate(z) if self.model == "hyper" else z

    def dynamic(self, task, obs: Tensor) -> tuple[Tensor, Tensor]:
        """mean, log_std (T, N, action) at obs (T, N, obs), with what `generate` returns."""
        if self.model == "hyper":
            mean, log_std = self.net.dynamic(task, obs).chunk(2, -1)
        else:
            z = task.unsqueeze(1).expand(-1, obs.shape[1], -1)
            mean, log_std = self.net(torch.cat([obs, z], -1)).chunk(2, -1)
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
    """N factors a task, (T, N, z), to the mean and variance (T, z) of their normalised product."""
    precision = 1 / variance
    variance = 1 / precision.sum(1)
    return variance * (precision * mean).sum(1), variance


class Encoder(nn.Module):
    """q(z|c) = Π_n N(z; f(s_n, a_n, r_n)): context (T, N, obs + action + 1) -> mean, variance."""

    def __init__(self, obs_dim: int, action_dim: int, latent_dim: int):
        super().__init__()
        self.net = make_mlp(obs_dim + action_dim + 1, 200, 200, 200, 2 * latent_dim)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self.net(context).chunk(2, -1)
        return product_of_gaussians(mean, F.softplus(variance).clamp(min=1e-7))


def kl_from_prior(mean: Tensor, variance: Tensor) -> Tensor:
    """KL(N(mean, variance) ‖ N(0, 1)), summed over dimensions and tasks (released)."""
    return 0.5 * (variance + mean.square() - 1 - variance.log()).sum()


class Agent(nn.Module):
    """Policy, twin Q, V with its target, and the encoder, which the oracle has not."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        oracle = args.context == "oracle"
        latent_dim = 1 if oracle else args.latent_dim
        base_dim = action_dim + latent_dim
        self.policy = Policy(obs_dim, action_dim, latent_dim, args)
        self.q = nn.ModuleList(Critic(obs_dim, base_dim, args) for _ in range(2))
        self.v = Critic(obs_dim, latent_dim, args)
        self.target_v = copy.deepcopy(self.v).requires_grad_(False)
        self.encoder = None if oracle else Encoder(obs_dim, action_dim, latent_dim)
        self.online, self.target = [*self.v.parameters()], [*self.target_v.parameters()]


def make_optimizers(agent: Agent, args: Args) -> dict[str, torch.optim.Optimizer]:
    rates = {"q": args.critic_lr, "v": args.critic_lr, "policy": args.policy_lr}
    rates |= {"encoder": args.encoder_lr} if agent.encoder else {}
    return {
        f"{name}_optimizer": torch.optim.Adam(getattr(agent, name).parameters(), lr, fused=True)
        for name, lr in rates.items()
    }


class Batch(NamedTuple):
    """N transitions of each of T tasks, and what says which task it is."""

    obs: Tensor  # (T, N, obs)
    action: Tensor  # (T, N, action)
    reward: Tensor  # (T, N)
    next_obs: Tensor  # (T, N, obs)
    terminated: Tensor  # (T, N)
    context: Tensor  # (T, M, obs + action + 1), or the goals (T, 1)


class ReplayBuffer:
    """The last `capacity` transitions of each task, a row each; memory grows as they come."""

    def __init__(self, num_tasks: int, widths: tuple[int, ...], capacity: int, device: str):
        self.widths, self.capacity = widths, capacity
        self.data = [torch.empty(0, sum(widths), device=device) for _ in range(num_tasks)]
        self.added = [0] * num_tasks

    def add(self, task: int, rows: Tensor) -> None:
        """Store transitions (N, row) of a task."""
        data, added = self.data[task], self.added[task]
        if len(data) < min(added + len(rows), self.capacity):
            size = min(2 * (added + len(rows)), self.capacity)
            self.data[task] = data.new_empty(size, data.shape[1])
            self.data[task][: len(data)] = data
        rows = rows[-self.capacity :]
        index = torch.arange(added, added + len(rows), device=data.device) % self.capacity
        self.data[task][index] = rows.to(data.device)
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


def normal(rng: np.random.Generator, *shape: int, device: str) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device)


@torch.no_grad()
def rollout(
    policy: Policy,
    z: Tensor,
    envs: MetaVectorEnv,
    slots: np.ndarray,
    rng: np.random.Generator,
    deterministic: bool = False,
) -> tuple[Tensor, np.ndarray]:
    """A trajectory with z (T, z) in each of `slots` (T,), a mask.

    -> transitions (T, H, row) and where they are one (T, H): until the trajectory's end.
    """
    task = policy.generate(z)  # once for the whole trajectory
    obs, _ = envs.reset(seed=int(rng.integers(2**31)), options={"reset_mask": slots})
    # For the whole horizon, (H, T, 1, action): the draws after it are the same for any policy
    noise = normal(rng, envs.horizon, len(z), 1, *envs.single_action_space.shape, device=z.device)
    done, rows, alive = ~slots, [], []
    while not done.all():
        mean, log_std = policy.dynamic(task, torch.as_tensor(obs).to(z).unsqueeze(1))
        u = mean if deterministic else mean + log_std.exp() * noise[len(rows)]
        action = torch.tanh(u).squeeze(1).cpu().numpy()  # (T, action)
        next_obs, reward, terminated, truncated, _ = envs.step(action)
        row = (obs, action, reward[:, None], next_obs, terminated[:, None])
        rows.append(np.concatenate(row, 1, dtype=np.float32))
        alive.append(~done)
        obs, done = next_obs, done | terminated | truncated
    rows = np.stack(rows, 1)
    for i in np.flatnonzero(~np.isfinite(rows).all((1, 2))):
        goal = envs.goals[i // envs.episodes_per_goal]
        stop(f"goal {goal:g}: an observation, an action or a reward is not finite", code=1)
    return torch.from_numpy(rows), np.stack(alive, 1)


def goal_tensor(goals: np.ndarray, args: Args) -> Tensor:
    """goals (T,) as the oracle's z (T, 1)"""
    return torch.as_tensor(goals[:, None], dtype=torch.float32, device=args.device)


@torch.no_grad()
def latents(
    agent: Agent, goals: np.ndarray, context: Tensor | None, rng: np.random.Generator, args: Args
) -> Tensor:
    """A sample of z for each of T goals: (T, z)

    From the prior without context, else from the posterior; the goal itself with the oracle.
    """
    if args.context == "oracle":
        return goal_tensor(goals, args)
    z = normal(rng, len(goals), args.latent_dim, device=args.device)
    if context is not None:
        mean, variance = agent.encoder(context)
        z = mean + variance.sqrt() * z
    return z


def collect(
    agent: Agent,
    envs: MetaVectorEnv,
    tasks: np.ndarray,
    num_steps: int,
    posterior: bool,
    buffer: ReplayBuffer,
    encoder_buffer: ReplayBuffer,
    train_goals: np.ndarray,
    rng: np.random.Generator,
    args: Args,
) -> int:
    """Whole trajectories of `tasks` (T,), at least `num_steps` a task; the steps of all of them.

    Each trajectory has its own z, from the prior, or from the posterior of transitions drawn anew.
    Only those from the prior enter the encoder's buffer, so no trajectory waits for another: all
    run side by side, and again where some ended so early that steps are missing.
    """
    envs.set_goals(train_goals[tasks])
    slot_tasks = np.repeat(tasks, envs.episodes_per_goal)
    steps = np.zeros(len(tasks), dtype=int)
    while (steps < num_steps).any():
        missing = np.ceil((num_steps - steps) / args.horizon)  # trajectories, if they are long
        slots = (np.arange(envs.episodes_per_goal) < missing[:, None]).reshape(-1)
        context = None
        if posterior and args.context == "learned":
            (context,) = encoder_buffer.sample(slot_tasks, args.context_batch_size, rng)
        z = latents(agent, train_goals[slot_tasks], context, rng, args)
        rows, alive = rollout(agent.policy, z, envs, slots, rng)
        for slot in np.flatnonzero(slots):
            trajectory = rows[slot, alive[slot]]
            buffer.add(slot_tasks[slot], trajectory)
            if not posterior and args.context == "learned":
                context_width = sum(encoder_buffer.widths)  # obs, action, reward
                encoder_buffer.add(slot_tasks[slot], trajectory[:, :context_width])
        steps += alive.reshape(len(tasks), -1).sum(1)
    return int(steps.sum())


def evaluate(agent: Agent, envs: MetaVectorEnv, args: Args) -> tuple[dict[str, np.ndarray], Tensor]:
    """Mean return of each goal (T,) with z from the prior, "pre", and then from the posterior,
    "post"; and the z of the latter.

    The policy is deterministic. Two trajectories with z from the prior gather the context, only the
    third is scored; the oracle has nothing to gather. The starts and the noise are the same always.
    """
    rng = np.random.default_rng(args.seed + 100)
    goals = np.repeat(envs.goals, envs.episodes_per_goal)
    slots = np.ones(len(goals), dtype=bool)
    width = sum((*envs.single_observation_space.shape, *envs.single_action_space.shape, 1))

    def returns(rows: Tensor, alive: np.ndarray) -> np.ndarray:
        reward = rows[..., width - 1].double().numpy()  # (T * E, H)
        return (reward * alive).sum(1).reshape(-1, envs.episodes_per_goal).mean(1)

    gathered = []
    for _ in range(2 if args.context == "learned" else 0):  # (released)
        z = latents(agent, goals, None, rng, args)
        gathered.append(rollout(agent.policy, z, envs, slots, rng, deterministic=True))
    result, contexts = {}, [None] * len(goals)
    if gathered:
        rows, alive = torch.cat([g[0] for g in gathered], 1), np.hstack([g[1] for g in gathered])
        contexts = [r[a, :width].to(args.device)[None] for r, a in zip(rows, alive)]
        result["pre"] = np.mean([returns(*g) for g in gathered], 0)
    z = torch.cat([latents(agent, g[None], c, rng, args) for g, c in zip(goals, contexts)])
    result["post"] = returns(*rollout(agent.policy, z, envs, slots, rng, deterministic=True))
    return result, z


def make_video_env(args: Args, goal: float) -> gym.Env:
    """One task that renders; ends here if this machine cannot."""
    try:
        kwargs = dict(goal=goal, render_mode="rgb_array", max_episode_steps=args.horizon)
        env = gym.make(args.env_id, **kwargs)
        env.reset()
        env.render()
    except Exception as error:
        stop(f"--capture-video: {error}")
    return env


def record_video(agent: Agent, z: Tensor, goal: float, args: Args, file: Path) -> None:
    """A trajectory of the first goal with its z (T, z) as {file}-episode-0.mp4."""
    env = make_video_env(args, goal)
    env = gym.wrappers.RecordVideo(env, str(file.parent), name_prefix=file.name)
    obs, _ = env.reset(seed=args.seed + 100)
    done = False
    with torch.no_grad():
        task = agent.policy.generate(z[:1])
        while not done:
            mean, _ = agent.policy.dynamic(task, torch.as_tensor(obs).to(z).view(1, 1, -1))
            obs, _, terminated, truncated, _ = env.step(torch.tanh(mean).flatten().cpu().numpy())
            done = terminated or truncated
    env.close()


def sample_batch(
    buffer: ReplayBuffer,
    encoder_buffer: ReplayBuffer,
    train_goals: np.ndarray,
    rng: np.random.Generator,
    args: Args,
) -> Batch:
    """Transitions of random train tasks, and a context of their latest collection."""
    tasks = rng.integers(args.num_train_goals, size=args.meta_batch_size)
    obs, action, reward, next_obs, terminated = buffer.sample(tasks, args.batch_size, rng)
    if args.context == "learned":
        (context,) = encoder_buffer.sample(tasks, args.context_batch_size, rng)
    else:
        context = goal_tensor(train_goals[tasks], args)
    return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1), context)


def infer(agent: Agent, context: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """z ~ q(z|c), reparameterised with `noise` (T, z), and the KL; the goals with the oracle."""
    if agent.encoder is None:
        return context, context.new_zeros(())
    mean, variance = agent.encoder(context)
    return mean + variance.sqrt() * noise, kl_from_prior(mean, variance)


def q_loss(agent: Agent, batch: Batch, z: Tensor, args: Args) -> Tensor:
    """Σ_i mean (Q_i(s, a, z) - y)², y = reward_scale r + γ (1 - terminated) V'(s', z).

    The encoder learns through z here, and not through the target.
    """
    z = z.unsqueeze(1).expand(-1, batch.obs.shape[1], -1)  # (T, N, z)
    with torch.no_grad():
        next_value = agent.target_v(batch.next_obs, z)
        target = args.reward_scale * batch.reward + args.gamma * (1 - batch.terminated) * next_value
    return sum(F.mse_loss(q(batch.obs, batch.action, z), target) for q in agent.q)


def v_and_policy_loss(
    agent: Agent, batch: Batch, z: Tensor, noise: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """mean (V(s, z) - y)² with y = min_i Q_i(s, a, z) - log π(a|s, z), and mean -y for a ~ π, with
    the mean squares of the policy's mean and log_std. noise: (T, N, action)

    z is a constant here. The critics are frozen before their forward pass: nothing of a primary
    network is kept for the backward pass.
    """
    obs, z = batch.obs, z.detach()
    mean, log_std = agent.policy.dynamic(agent.policy.generate(z), obs)
    u = mean + log_std.exp() * noise
    z = z.unsqueeze(1).expand(-1, obs.shape[1], -1)  # (T, N, z)
    agent.q.requires_grad_(False)
    q = torch.min(*(q(obs, torch.tanh(u), z) for q in agent.q))
    agent.q.requires_grad_(True)
    y = q - log_prob(u, noise, log_std)
    regularisation = mean.square().mean() + log_std.square().mean()
    return F.mse_loss(agent.v(obs, z), y.detach()), args.policy_reg * regularisation - y.mean()


def descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def update(
    agent: Agent,
    optimizers: dict[str, torch.optim.Optimizer],
    batch: Batch,
    z_noise: Tensor,
    noise: Tensor,
    args: Args,
) -> dict[str, Tensor]:
    """One step of Q and the encoder, of V and the policy, and of the target; the losses.

    Standard normal noise: z_noise (T, z), noise (T, N, action).
    """
    losses = {}
    z, losses["kl"] = infer(agent, batch.context, z_noise)
    losses["q_loss"] = q_loss(agent, batch, z, args)
    names = ("q_optimizer", "encoder_optimizer") if agent.encoder else ("q_optimizer",)
    loss = losses["q_loss"] + args.kl_weight * losses["kl"]
    descend(loss, *(optimizers[name] for name in names))
    losses["v_loss"], losses["policy_loss"] = v_and_policy_loss(agent, batch, z, noise, args)
    loss = losses["v_loss"] + losses["policy_loss"]  # of different parameters
    descend(loss, optimizers["v_optimizer"], optimizers["policy_optimizer"])
    with torch.no_grad():
        torch._foreach_lerp_(agent.target, agent.online, args.tau)  # V' <- V' + τ (V - V')
    return {name: loss.detach() for name, loss in losses.items()}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is a crash like any other
    args = parse_args()
    if args.capture_video:
        make_video_env(args, goal=1.0).close()  # or say now what is missing
    run_dir, lock = claim_run(args)
    checkpoint = load_checkpoint(run_dir)
    fast_matmul()

    torch.manual_seed(args.seed)  # initial weights
    rng = np.random.default_rng(args.seed)  # goals, environments, actions, latents, batches
    train_goals = sample_goals(args.env_id, args.num_train_goals, rng, "train")
    test_goals = sample_goals(args.env_id, args.num_test_goals, rng, "test")
    eval_goals = {"train": train_goals[: args.num_test_goals], "test": test_goals}
    steps = max(args.num_prior_steps, args.num_posterior_steps)
    simulation = (torch.get_num_threads(), args.horizon)
    goals = np.resize(train_goals, args.num_collect_goals)
    envs = MetaVectorEnv(args.env_id, goals, math.ceil(steps / args.horizon), *simulation)
    goals = np.concatenate([*eval_goals.values()])
    eval_envs = MetaVectorEnv(args.env_id, goals, args.eval_episodes, *simulation)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent = Agent(obs_dim, action_dim, args).to(args.device)
    optimizers = make_optimizers(agent, args)
    widths = (obs_dim, action_dim, 1, obs_dim, 1)
    buffer = ReplayBuffer(args.num_train_goals, widths, args.buffer_size, args.device)
    widths = (obs_dim + action_dim + 1,)
    encoder_buffer = ReplayBuffer(args.num_train_goals, widths, args.buffer_size, args.device)
    parts = {"agent": agent, "buffer": buffer, "encoder_buffer": encoder_buffer, **optimizers}
    data = (buffer, encoder_buffer, train_goals)
    iteration, env_steps = 0, 0
    eval_csv = "iteration,env_steps,split,goal,phase,return\n"
    if checkpoint:
        iteration, env_steps = checkpoint["iteration"], checkpoint["env_steps"]
        eval_csv = checkpoint["eval_csv"]
        rng.bit_generator.state = checkpoint["rng"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        write(run_dir / "eval.csv", eval_csv)
    print(
        f"{'resuming' if checkpoint else 'starting'} {run_dir} at iteration {iteration}", flush=True
    )
    if args.track:
        track(run_dir, args)
    threading.excepthook = thread_failed
    writer = SummaryWriter(run_dir, purge_step=iteration)
    del checkpoint  # the replay buffers' memory
    terminal = sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")
    bar = tqdm(initial=iteration, total=args.num_iterations, smoothing=0, file=terminal)
    checkpoint_iteration, first_env_steps = iteration, env_steps

    while True:
        due = checkpoint_iteration + args.checkpoint_every
        if iteration >= due or iteration == args.num_iterations:
            writer.flush()
            counters = {"iteration": iteration, "env_steps": env_steps, "eval_csv": eval_csv}
            counters |= {"rng": rng.bit_generator.state}
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(run_dir, states | counters)
            del states
            checkpoint_iteration = iteration

        if iteration % args.eval_every == 0 or iteration == args.num_iterations:
            returns, z = evaluate(agent, eval_envs, args)
            means = {}
            for phase, values in returns.items():
                splits = np.split(values, [len(eval_goals["train"])])
                for (split, goals), values in zip(eval_goals.items(), splits):
                    for goal, value in zip(goals, values):
                        eval_csv += f"{iteration},{env_steps},{split},{goal},{phase},{value}\n"
                    means[f"{split}_{phase}"] = values.mean()
            for name, mean in means.items():
                writer.add_scalar(f"eval/{name}_return", mean, iteration)
            write(run_dir / "eval.csv", eval_csv)
            bar.set_postfix_str(
                "return " + ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
            )
            if terminal is not sys.stderr:
                print(bar, flush=True)
            if args.capture_video:
                first = len(eval_goals["train"]) * args.eval_episodes
                file = run_dir / "videos" / f"iteration_{iteration}"
                record_video(agent, z[first:], test_goals[0], args, file)
        if args.save_every and iteration % args.save_every == 0:
            write(run_dir / f"step_{iteration}.pt", agent.state_dict())
        if iteration == args.num_iterations:
            break

        # Collect: all tasks once; then some, for the encoder anew, with z ~ p(z) and z ~ q(z|c)
        if iteration == 0:
            tasks, steps = np.arange(args.num_train_goals), args.num_initial_steps
            episodes = math.ceil(steps / args.horizon)
            all_envs = MetaVectorEnv(args.env_id, train_goals, episodes, *simulation)
            env_steps += collect(agent, all_envs, tasks, steps, False, *data, rng, args)
            all_envs.close()
        tasks = rng.integers(args.num_train_goals, size=args.num_collect_goals)
        for task in tasks:
            encoder_buffer.clear(task)
        env_steps += collect(agent, envs, tasks, args.num_prior_steps, False, *data, rng, args)
        env_steps += collect(agent, envs, tasks, args.num_posterior_steps, True, *data, rng, args)

        # Learn: Q and the encoder, V and the policy
        total = 0
        for _ in range(args.num_train_steps):
            batch = sample_batch(*data, rng, args)
            z_noise = normal(rng, args.meta_batch_size, args.latent_dim, device=args.device)
            noise = normal(rng, *batch.action.shape, device=args.device)
            losses = update(agent, optimizers, batch, z_noise, noise, args)
            total = total + torch.stack([*losses.values()])
        losses = dict(zip(losses, (total / args.num_train_steps).tolist()))  # one host sync
        check_finite(iteration, **losses)
        check_finite(iteration, weight=torch.stack([p.sum() for p in agent.parameters()]).tolist())
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, iteration)
        writer.add_scalar("charts/env_steps", env_steps, iteration)
        sps = (env_steps - first_env_steps) / bar.format_dict["elapsed"]
        writer.add_scalar("charts/SPS", sps, iteration)
        iteration += 1
        bar.update()

    write(run_dir / f"step_{iteration}.pt", agent.state_dict())
    writer.close()
    summary = {"iteration": iteration, "env_steps": env_steps} | means
    write(run_dir / "summary.json", json.dumps(summary) + "\n")  # last: the run is complete
    print(f"{run_dir} is complete")
    lock.release()
