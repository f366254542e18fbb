"""MAML-TRPO (Finn et al., 2017) with the three policies of the hypernetwork paper (Sec. 4).

With `--model hyper` a primary network turns the task's context c into the weights of a small
dynamic network, π_{w(c)}(a|s), so that the gradients of the task and of the state are disentangled.
`context` is an MLP on [s, c], `vanilla` one on s alone.

    python maml_hyper.py --env-id HalfCheetahFwdBack-v0 --model hyper

In the help, (paper) marks a value of the paper and (released) one of the authors' code.
"""

import contextlib
import ctypes
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
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, NamedTuple, NoReturn
from zipfile import BadZipFile, ZipFile

import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.autograd.forward_ad as fwAD
import tyro
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hypernet import HyperNetwork
from meta_envs import FAMILIES, MetaVectorEnv, sample_goals


@dataclass
class Args:
    """MAML with hypernetwork policies. The defaults are the paper's run."""

    env_id: str = "HalfCheetahFwdBack-v0"
    """family of tasks (paper: HalfCheetahFwdBack, AntFwdBack, HalfCheetahVel, AntVel,
    HalfCheetahVelMedium, all -v0)"""
    seed: int = 1
    """seed of goals, network weights, environments and action noise (paper: 5 seeds)"""
    num_iterations: int = 400
    """meta-updates of the whole run; a larger number extends a run (released)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes cuda where there is one"""
    runs_dir: str = "runs"
    """the run goes to RUNS_DIR/EXP_NAME/ENV_ID/MODEL/seedSEED"""
    exp_name: str = "maml_hyper"
    """name of the experiment, a part of the run directory"""
    eval_every: int = 1
    """iterations between two evaluations, the first before any update"""
    eval_episodes: int = 20
    """episodes a test goal before and as many after adaptation, of the policy that samples, as in
    training (released)"""
    checkpoint_every: int = 5
    """iterations between two checkpoints"""
    save_every: int = 0
    """iterations between two step_N.pt, the policy alone; 0 saves the last one only"""
    capture_video: bool = False
    """at each evaluation, write an episode of the first test goal's adapted policy, its mean
    action, to videos/ in the run directory"""
    track: bool = False
    """send the TensorBoard scalars to Weights & Biases too (needs: pip install wandb)"""
    overwrite: bool = False
    """delete what the run directory holds and start afresh"""

    model: Literal["vanilla", "context", "hyper"] = "hyper"
    """policy: MLP on the state, MLP on state and context, or hypernetwork (paper, Sec. 4)"""
    primary_widths: tuple[int, ...] = (256, 512, 1024)
    """widths of the primary network of hyper (released)"""
    dynamic_width: int = 256
    """hidden units of the dynamic network of hyper (paper, Sec. 2)"""
    hyper_init: Literal["released", "paper", "bias"] = "released"
    """start of the dynamic weights of hyper (paper, Sec. 5.2): released, the small constants of the
    authors' code; paper, like Kaiming-uniform; bias, one ordinary network for every input"""
    num_train_goals: int = 100
    """tasks to train on, drawn once from the seed (released)"""
    num_test_goals: int = 20
    """tasks to evaluate on, drawn once from the seed (released)"""
    meta_batch_size: int = 40
    """tasks of one iteration (released)"""
    episodes_per_goal: int = 20
    """episodes a task before each inner step, and as many after the last (released)"""
    horizon: int = 200
    """environment steps of an episode (released)"""
    gamma: float = 0.95
    """discount factor (released)"""
    gae_lambda: float = 1.0
    """λ of the generalised advantage estimate (released)"""
    inner_lr: float | None = None
    """η of Eq. 15; None is 5e-5 for hyper, 0.1 for the others (released)"""
    num_adapt_steps: int = 1
    """inner steps of Eq. 15; 0 trains the policy without adaptation (released)"""
    first_order: bool = False
    """take the inner step for a constant in the meta-gradient, as the released code does"""
    max_kl: float = 0.01
    """the most that one iteration moves the adapted policies, the mean KL over tasks and states, in
    nats (released)"""
    cg_iterations: int = 10
    """iterations of the conjugate gradient (released)"""
    cg_damping: float = 1e-5
    """added to the Fisher matrix's diagonal (released)"""
    line_search_steps: int = 20
    """step sizes that the line search tries, each 0.8 times the one before (released)"""


# The least value of each number.
AT_LEAST = {
    0: "seed save_every inner_lr num_adapt_steps max_kl cg_damping",
    1: "num_iterations eval_every eval_episodes checkpoint_every dynamic_width num_train_goals "
    "num_test_goals meta_batch_size episodes_per_goal horizon cg_iterations line_search_steps",
}


def stop(message: str, code: int = 2) -> NoReturn:
    """Say on stderr in one line why it ends here: code 2 for bad use, 1 for a run gone wrong."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def parse_args() -> Args:
    """The command line's arguments, checked, with `device` and `inner_lr` filled in."""
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
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            stop(f"--{name.replace('_', '-')} {getattr(args, name)}: must be in [0, 1]")
    if args.max_kl == 0:
        stop("--max-kl 0: must be above 0")
    if args.meta_batch_size > args.num_train_goals:
        stop(f"--meta-batch-size {args.meta_batch_size}: must be at most --num-train-goals")
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
    if args.inner_lr is None:
        args.inner_lr = 5e-5 if args.model == "hyper" else 0.1
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


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, since an update takes and frees tensors of many megabytes.

    By default each of them goes back to the system and is paged in anew the next time, which takes
    as long as the arithmetic (measured: half the time of a Fisher product).
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no memory of its own for a large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB
        libc.mallopt(-2, 2**26)  # M_TOP_PAD: take 64 MiB at a time


# Arguments that cannot change the result: a run may be resumed with others.
FREE_ARGS = ("runs_dir", "checkpoint_every", "save_every", "capture_video", "track", "overwrite")


def claim_run(args: Args) -> tuple[Path, filelock.FileLock]:
    """Lock the run directory for this process and write its config.json.

    Ends here if the run is complete, belongs to other arguments, or is alive in another process.
    """
    run_dir = Path(args.runs_dir, args.exp_name, args.env_id, args.model, f"seed{args.seed}")
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


class Policy(nn.Module):
    """Gaussian policies of T tasks: context (T, 1), obs (T, N, obs) -> mean, log_std.

    The mean (T, N, action) is an MLP's of 100-100 with Xavier weights (released), or a dynamic
    network's; the log_std (T, 1, action) does not depend on the state.
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.model = args.model
        if self.model == "hyper":
            hyper = (args.dynamic_width, args.primary_widths, args.hyper_init)
            self.net = HyperNetwork(1, obs_dim, action_dim, *hyper)
        else:
            widths = (obs_dim + (self.model == "context"), 100, 100, action_dim)
            layers = [nn.Linear(*dims) for dims in zip(widths, widths[1:])]
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            self.net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        with warnings.catch_warnings(action="ignore"):  # that there is nothing to initialise
            self.log_std = nn.Linear(0, action_dim)  # a bias, which adapts as other layers' do
        nn.init.zeros_(self.log_std.bias)

    def generate(self, context: Tensor) -> tuple:
        """What is the same for all states of a task: dynamic weights or context, and log_std."""
        log_std = self.log_std(context[:, :0]).unsqueeze(1)
        return (self.net.generate(context) if self.model == "hyper" else context), log_std

    def dynamic(self, task, obs: Tensor) -> Tensor:
        """The mean (T, N, action) at obs (T, N, obs), with the first of what `generate` returns."""
        if self.model == "hyper":
            return self.net.dynamic(task, obs)
        if self.model == "context":
            obs = torch.cat([obs, task.unsqueeze(1).expand(-1, obs.shape[1], -1)], -1)
        return self.net(obs)

    def forward(self, context: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
        task, log_std = self.generate(context)
        return self.dynamic(task, obs), log_std


# An inner step: what it adds to each layer's weights, task by task, as (W, b) or as (x, -η δ).
Step = dict[nn.Linear, tuple[Tensor, Tensor]]


@contextlib.contextmanager
def adapted(policy: Policy, steps: list[Step]) -> Iterator[dict[nn.Linear, tuple[Tensor, Tensor]]]:
    """Within, the layers of `policy` have the weights θ_i = θ + Σ steps of task i; yields, for each
    layer, the last input and output.

    An MLP sees N states a task, and a step of one of its layers is W (T, in, out), b (T, 1, out).
    A hypernetwork sees one context a task, so the gradient of a layer's weights is the outer
    product of its input x and of δ, the gradient in its output: a step is x and -η δ, and T copies
    of millions of weights are never made.
    """
    seen = {}

    def add_steps(layer: nn.Linear, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        (x,) = inputs
        for step in steps:
            if x.dim() == 2:  # (T, in): one row a task
                x_k, step_k = step[layer]
                y = y + ((x * x_k).sum(-1, keepdim=True) + 1) * step_k
            else:
                W, b = step[layer]
                y = y + x @ W + b
        if torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_()  # for δ, where θ itself is a constant
        seen[layer] = (x, y)
        return y

    layers = [layer for layer in policy.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(add_steps) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Batch(NamedTuple):
    """Episodes of T tasks, N = episodes * horizon samples each."""

    context: Tensor  # (T, 1)
    obs: Tensor  # (T, N, obs)
    action: Tensor  # (T, N, action)
    advantage: Tensor  # (T, N), mean 0 and variance 1 over each task
    weight: Tensor  # (T, N), sums to 1 over each task; 0 after an episode's early end


def log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log N(action; mean, exp(log_std)²), summed over the actions: (T, N)"""
    z = (action - mean) / log_std.exp()
    return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def inner_step(
    policy: Policy, theta: dict[str, Tensor], steps: list[Step], batch: Batch, args: Args
) -> Step:
    """-η ∇L_i with L_i = -mean Â log π_{θ_i}(a|s) of each task, as a function of θ.

    Eq. 15 with the mean over an episode's steps in place of the sum (released).
    """
    with adapted(policy, steps) as seen, torch.enable_grad():
        mean, log_std = functional_call(policy, theta, (batch.context, batch.obs))
        loss = -(batch.weight * batch.advantage * log_prob(mean, log_std, batch.action)).sum()
    graph = any(parameter.requires_grad for parameter in theta.values())
    deltas = torch.autograd.grad(loss, [y for _, y in seen.values()], create_graph=graph)
    step = {}
    for (layer, (x, _)), delta in zip(seen.items(), deltas):
        step_k = -args.inner_lr * delta
        if x.dim() == 2:
            step[layer] = (x, step_k)
        else:
            step[layer] = (x.mT @ step_k, step_k.sum(1, keepdim=True))
    return step


def advantages(obs: np.ndarray, reward: np.ndarray, alive: np.ndarray, args: Args) -> np.ndarray:
    """Generalised advantages over a linear baseline of each task, normalised over the task.

    obs (T, E, H, obs), reward and alive (T, E, H) -> (T, E, H). The baseline is fitted to the
    discounted returns by least squares on obs, obs², t, t², t³ and 1, t in hundreds of steps, with
    a ridge of 1e-5 (released). Nothing follows the horizon, nor an episode's early end.
    """
    T, E, H = alive.shape
    returns, advantage = reward.copy(), reward.copy()
    for t in reversed(range(H - 1)):
        returns[..., t] += args.gamma * returns[..., t + 1]
    time = np.broadcast_to(np.arange(H) / 100, alive.shape)
    features = [obs, obs**2, np.stack([time, time**2, time**3, np.ones_like(time)], -1)]
    X = (np.concatenate(features, -1) * alive[..., None]).reshape(T, E * H, -1)
    ridge = 1e-5 * np.eye(X.shape[-1])
    w = np.linalg.solve(X.mT @ X + ridge, X.mT @ returns.reshape(T, E * H, 1))
    value = (X @ w).reshape(T, E, H)
    advantage -= value
    advantage[..., :-1] += args.gamma * value[..., 1:]  # r + γ V(s') - V(s)
    for t in reversed(range(H - 1)):
        advantage[..., t] += args.gamma * args.gae_lambda * advantage[..., t + 1]
    weight = alive / alive.sum((1, 2), keepdims=True)
    advantage -= (weight * advantage).sum((1, 2), keepdims=True)
    variance = (weight * advantage**2).sum((1, 2), keepdims=True)
    return alive * advantage / np.sqrt(variance + 1e-8)


@torch.no_grad()
def sample(
    policy: Policy, steps: list[Step], envs: MetaVectorEnv, rng: np.random.Generator, args: Args
) -> tuple[Batch, np.ndarray]:
    """An episode in each slot with the adapted policies, and the returns (T, episodes)."""
    T, E, H = len(envs.goals), envs.episodes_per_goal, args.horizon
    low, high = envs.single_action_space.low, envs.single_action_space.high
    (obs_dim,), (action_dim,) = envs.single_observation_space.shape, low.shape
    all_obs = np.zeros((H, T, E, obs_dim), dtype=np.float32)
    all_actions = np.zeros((H, T, E, action_dim), dtype=np.float32)
    rewards, alive = np.zeros((H, T, E)), np.zeros((H, T, E), dtype=bool)
    context = torch.as_tensor(envs.goals[:, None], dtype=torch.float32, device=args.device)
    obs, _ = envs.reset(seed=int(rng.integers(2**31)))
    done = np.zeros(T * E, dtype=bool)
    with adapted(policy, steps):
        task, log_std = policy.generate(context)
        for t in range(H):
            all_obs[t], alive[t] = obs.reshape(T, E, -1), ~done.reshape(T, E)
            mean = policy.dynamic(task, torch.from_numpy(all_obs[t]).to(args.device))
            noise = rng.standard_normal((T, E, action_dim), dtype=np.float32)
            action = (mean + log_std.exp() * torch.from_numpy(noise).to(args.device)).cpu().numpy()
            finite = np.isfinite(action).all((1, 2))
            if not finite.all():
                which = f"task {finite.argmin()} (goal {envs.goals[finite.argmin()]:g})"
                hint = ", lower --inner-lr" if steps else ""
                stop(f"the policy of {which} is not finite after {len(steps)} inner steps{hint}", 1)
            all_actions[t] = action
            action = action.reshape(T * E, -1).clip(low, high)
            obs, reward, terminated, truncated, _ = envs.step(action)
            rewards[t] = reward.reshape(T, E)
            done = terminated | truncated
            if done.all():
                break
    obs, action, reward, alive = (
        np.moveaxis(x, 0, 2) for x in (all_obs, all_actions, rewards, alive)
    )  # (T, E, H, ...)
    advantage = advantages(obs.astype(np.float64), reward, alive, args)
    weight = alive / alive.sum((1, 2), keepdims=True)
    tensors = (
        torch.as_tensor(x.reshape(T, E * H, *x.shape[3:]), dtype=torch.float32).to(args.device)
        for x in (obs, action, advantage, weight)
    )
    return Batch(context, *tensors), reward.sum(-1)


CHUNK = 20_000  # samples that go through a policy at once, which bounds the memory


def split_tasks(batch: Batch) -> list[slice]:
    """The tasks in chunks of at most `CHUNK` samples, or of one task."""
    T, N = batch.weight.shape
    size = max(1, CHUNK // N)
    return [slice(i, i + size) for i in range(0, T, size)]


def take(batch: Batch, tasks: slice) -> Batch:
    return Batch(*(x[tasks] for x in batch))


def take_steps(steps: list[Step], tasks: slice) -> list[Step]:
    return [{layer: (a[tasks], b[tasks]) for layer, (a, b) in step.items()} for step in steps]


class Episodes(NamedTuple):
    """What one iteration samples: episodes before each inner step and after the last."""

    pre: list[Batch]
    post: Batch
    steps: list[Step]
    returns: dict[str, np.ndarray]  # "pre", "post": mean return of each task (T,)


def adapt_and_sample(
    policy: Policy, envs: MetaVectorEnv, rng: np.random.Generator, args: Args
) -> Episodes:
    """Episodes of θ, an inner step on them, episodes of θ_i; and so on for more inner steps."""
    theta = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    pre, steps, returns = [], [], []
    for _ in range(args.num_adapt_steps):
        batch, batch_returns = sample(policy, steps, envs, rng, args)
        parts = [
            inner_step(policy, theta, take_steps(steps, tasks), take(batch, tasks), args)
            for tasks in split_tasks(batch)
        ]
        step = {
            layer: tuple(torch.cat(part).detach() for part in zip(*(p[layer] for p in parts)))
            for layer in parts[0]
        }
        pre, steps = [*pre, batch], [*steps, step]
        returns.append(batch_returns)
    post, batch_returns = sample(policy, steps, envs, rng, args)
    returns.append(batch_returns)
    phases = {"pre": returns[0].mean(1)}
    if steps:
        phases["post"] = returns[-1].mean(1)
    return Episodes(pre, post, steps, phases)


class Chunk(NamedTuple):
    """What TRPO needs of some of the iteration's tasks."""

    pre: list[Batch]
    post: Batch
    steps: list[Step] | None  # the inner steps, if they are constants
    mean: Tensor  # of the policies that sampled `post`, (T, N, action)
    log_std: Tensor  # (T, 1, action)
    share: float  # of each task in the mean over the iteration's tasks


def as_dict(policy: Policy, theta: Tensor) -> dict[str, Tensor]:
    """A vector of all parameters as views by name."""
    parts = theta.split([parameter.numel() for parameter in policy.parameters()])
    return {n: part.view_as(p) for (n, p), part in zip(policy.named_parameters(), parts)}


def outputs(
    policy: Policy,
    theta: Tensor,
    pre: list[Batch],
    post: Batch,
    steps: list[Step] | None,
    args: Args,
) -> tuple[Tensor, Tensor]:
    """mean, log_std of the adapted policies at the states of `post`, as a function of θ.

    With `steps` given these are constants: the meta-gradient is of first order.
    """
    parameters = as_dict(policy, theta)
    if steps is None:
        steps = []
        for batch in pre:
            steps.append(inner_step(policy, parameters, steps, batch, args))
    with adapted(policy, steps):
        return functional_call(policy, parameters, (post.context, post.obs))


def surrogate_and_kl(
    policy: Policy, theta: Tensor, chunks: list[Chunk], args: Args
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each chunk of tasks its part of the mean of Â π_θi / π_old and of KL(π_old ‖ π_θi)."""
    for chunk in chunks:
        mean, log_std = outputs(policy, theta, chunk.pre, chunk.post, chunk.steps, args)
        action, weight = chunk.post.action, chunk.share * chunk.post.weight
        old_log_prob = log_prob(chunk.mean, chunk.log_std, action)
        ratio = (log_prob(mean, log_std, action) - old_log_prob).exp()
        variance, old_variance = (2 * log_std).exp(), (2 * chunk.log_std).exp()
        kl = (old_variance + (chunk.mean - mean).square()) / (2 * variance) - 0.5
        kl = (kl + log_std - chunk.log_std).sum(-1)
        yield (weight * chunk.post.advantage * ratio).sum(), (weight * kl).sum()


def meta_gradient(policy: Policy, theta: Tensor, chunks: list[Chunk], args: Args) -> Tensor:
    """∇_θ of the surrogate, through the inner steps: a vector like θ (Eq. 15)."""
    theta = theta.detach().requires_grad_()
    gradient = torch.zeros_like(theta)
    for surrogate, _ in surrogate_and_kl(policy, theta, chunks, args):
        gradient += torch.autograd.grad(surrogate, theta)[0]
    return gradient


def fisher_product(
    policy: Policy, theta: Tensor, chunks: list[Chunk], vector: Tensor, args: Args
) -> Tensor:
    """The Hessian of the KL at θ times a vector, exactly: Jᵀ F J v.

    J is the Jacobian of the adapted policies' outputs in θ, F the Fisher metric of a Gaussian,
    1/σ² for its mean and 2 for its log_std: a forward-mode product, F, a reverse-mode product.
    """
    product = torch.zeros_like(vector)
    leaf = theta.detach().requires_grad_()
    for chunk in chunks:
        data = (chunk.pre, chunk.post, chunk.steps, args)
        with torch.no_grad(), fwAD.dual_level():
            duals = outputs(policy, fwAD.make_dual(theta, vector), *data)
            d_mean, d_log_std = (fwAD.unpack_dual(dual).tangent for dual in duals)
        weight = chunk.share * chunk.post.weight.unsqueeze(-1)
        cotangents = (weight * d_mean / (2 * chunk.log_std).exp(), 2 * chunk.share * d_log_std)
        product += torch.autograd.grad(outputs(policy, leaf, *data), leaf, cotangents)[0]
    return product


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """x with product(x) = b, about, for a product with a symmetric, positive definite matrix."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    r_dot_r = r.dot(r)
    for _ in range(iterations):
        if r_dot_r <= tolerance:
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
    policy: Policy, theta: Tensor, step: Tensor, chunks: list[Chunk], args: Args
) -> dict[str, float]:
    """Move θ by the largest 0.8^k step with a better surrogate and a KL within bounds, if any."""

    def measure(theta: Tensor) -> list[float]:
        return torch.tensor([*surrogate_and_kl(policy, theta, chunks, args)]).sum(0).tolist()

    before, _ = measure(theta)
    for k in range(args.line_search_steps):
        candidate = theta + 0.8**k * step
        surrogate, kl = measure(candidate)
        if surrogate > before and kl <= args.max_kl:
            vector_to_parameters(candidate, policy.parameters())
            return {"surrogate": surrogate - before, "kl": kl, "step_size": 0.8**k}
    return {"surrogate": 0.0, "kl": 0.0, "step_size": 0.0}


def update(policy: Policy, episodes: Episodes, args: Args) -> dict[str, float]:
    """One TRPO step of θ on the surrogate; what it came to."""
    theta = parameters_to_vector(policy.parameters()).detach()
    steps = episodes.steps if args.first_order else None
    share = 1 / len(episodes.post.obs)
    chunks = []
    for tasks in split_tasks(episodes.post):
        pre, post = [take(batch, tasks) for batch in episodes.pre], take(episodes.post, tasks)
        constant = None if steps is None else take_steps(steps, tasks)
        with torch.no_grad():
            mean, log_std = outputs(policy, theta, pre, post, constant, args)
        chunks.append(Chunk(pre, post, constant, mean, log_std, share))

    def product(vector: Tensor) -> Tensor:
        return fisher_product(policy, theta, chunks, vector, args) + args.cg_damping * vector

    gradient = meta_gradient(policy, theta, chunks, args)
    if not gradient.isfinite().all():
        return {"gradient_norm": math.nan}
    direction = conjugate_gradient(product, gradient, args.cg_iterations)
    length = (2 * args.max_kl / direction.dot(product(direction))).sqrt()
    result = line_search(policy, theta, length * direction, chunks, args)
    return {"gradient_norm": gradient.norm().item()} | result


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


def record_video(policy: Policy, steps: list[Step], goal: float, args: Args, file: Path) -> None:
    """An episode of the first task's adapted policy, its mean action, as {file}-episode-0.mp4."""
    env = make_video_env(args, goal)
    env = gym.wrappers.RecordVideo(env, str(file.parent), name_prefix=file.name)
    context = torch.tensor([[goal]], dtype=torch.float32, device=args.device)
    obs, _ = env.reset(seed=args.seed + 100)
    done = False
    with torch.no_grad(), adapted(policy, take_steps(steps, slice(1))):
        task, _ = policy.generate(context)
        while not done:
            obs = torch.as_tensor(obs, dtype=torch.float32, device=args.device).view(1, 1, -1)
            action = policy.dynamic(task, obs).flatten().cpu().numpy()
            action = action.clip(env.action_space.low, env.action_space.high)
            obs, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
    env.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is a crash like any other
    args = parse_args()
    if args.capture_video:
        make_video_env(args, goal=1.0).close()  # or say now what is missing
    run_dir, lock = claim_run(args)
    checkpoint = load_checkpoint(run_dir)
    fast_matmul()
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
    iteration, env_steps = 0, 0
    eval_csv = "iteration,env_steps,split,goal,phase,return\n"
    if checkpoint:
        iteration, env_steps = checkpoint["iteration"], checkpoint["env_steps"]
        eval_csv = checkpoint["eval_csv"]
        rng.bit_generator.state = checkpoint["rng"]
        policy.load_state_dict(checkpoint["policy"])
        write(run_dir / "eval.csv", eval_csv)
    print(
        f"{'resuming' if checkpoint else 'starting'} {run_dir} at iteration {iteration}", flush=True
    )
    if args.track:
        track(run_dir, args)
    threading.excepthook = thread_failed
    writer = SummaryWriter(run_dir, purge_step=iteration)
    del checkpoint
    terminal = sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")
    bar = tqdm(initial=iteration, total=args.num_iterations, smoothing=0, file=terminal)
    checkpoint_iteration, first_env_steps = iteration, env_steps

    while True:
        due = checkpoint_iteration + args.checkpoint_every
        if iteration >= due or iteration == args.num_iterations:
            writer.flush()
            counters = {"iteration": iteration, "env_steps": env_steps, "eval_csv": eval_csv}
            counters |= {"rng": rng.bit_generator.state}
            save_checkpoint(run_dir, {"policy": policy.state_dict()} | counters)
            checkpoint_iteration = iteration

        # Sample: episodes of each task with θ, an inner step (Eq. 15), episodes with θ_i
        envs.set_goals(rng.choice(train_goals, args.meta_batch_size, replace=False))
        episodes = adapt_and_sample(policy, envs, rng, args)

        if iteration % args.eval_every == 0 or iteration == args.num_iterations:
            eval_rng = np.random.default_rng(args.seed + 100)  # the same starts and noise always
            test_episodes = adapt_and_sample(policy, test_envs, eval_rng, args)
            for split, goals, result in (
                ("train", envs.goals, episodes),
                ("test", test_goals, test_episodes),
            ):
                for phase, returns in result.returns.items():
                    check_finite(iteration, evaluation_return=returns)
                    for goal, value in zip(goals, returns):
                        eval_csv += f"{iteration},{env_steps},{split},{goal},{phase},{value}\n"
                    writer.add_scalar(f"eval/{split}_{phase}_return", returns.mean(), iteration)
            write(run_dir / "eval.csv", eval_csv)
            bar.set_postfix_str(
                "test return "
                + ", ".join(f"{k} {v.mean():.1f}" for k, v in test_episodes.returns.items())
            )
            if terminal is not sys.stderr:
                print(bar, flush=True)
            if args.capture_video:
                file = run_dir / "videos" / f"iteration_{iteration}"
                record_video(policy, test_episodes.steps, test_goals[0], args, file)
        if args.save_every and iteration % args.save_every == 0:
            write(run_dir / f"step_{iteration}.pt", policy.state_dict())
        if iteration == args.num_iterations:
            break

        # Learn: one TRPO step of θ on all tasks
        losses = update(policy, episodes, args)
        check_finite(iteration, **losses)
        env_steps += sum((b.weight > 0).sum().item() for b in [*episodes.pre, episodes.post])
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, iteration)
        for phase, returns in episodes.returns.items():
            writer.add_scalar(f"charts/{phase}_return", returns.mean(), iteration)
        writer.add_scalar("charts/env_steps", env_steps, iteration)
        sps = (env_steps - first_env_steps) / bar.format_dict["elapsed"]
        writer.add_scalar("charts/SPS", sps, iteration)
        iteration += 1
        bar.update()

    write(run_dir / f"step_{iteration}.pt", policy.state_dict())
    writer.close()
    means = {f"test_{phase}": returns.mean() for phase, returns in test_episodes.returns.items()}
    summary = {"iteration": iteration, "env_steps": env_steps} | means
    write(run_dir / "summary.json", json.dumps(summary) + "\n")  # last: the run is complete
    print(f"{run_dir} is complete")
    lock.release()
