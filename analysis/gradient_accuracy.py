"""How good the critics' action gradients are (paper, Sec. 3, Fig. 3), in runs of td3_hyper.py.

    python td3_hyper.py --env-id Hopper-v4 --critic sa-hyper --save-every 10000
    python analysis/gradient_accuracy.py runs/td3_hyper

For every step_N.pt and each of 15 states of its policy's own distribution, two gradients of Q in
the action at a = π(s), and their cosine similarity:
- the critic's: ∇_a Q1(s, π(s));
- the "true" one: the slope of a linear least-squares fit, with intercept, of return on action, over
  15 rollouts from s. Each draws an action around π(s), clipped to the bounds, holds it for 3 steps
  and then follows π.

A rollout goes on to the end of the episode, and the state's own time step counts towards the
environment's time limit. Where that limit cuts it after k steps, γ^k min_i Q'_i(s_k, π(s_k)) of the
target critics stands for the rest; a termination is worth nothing more. (released, all of it)

Holding the action makes the return depend on it more strongly, but what is fitted then is not quite
Q(s, a), after whose first step the policy takes over. `--hold 1` fits that.

Writes gradient_accuracy.csv, a row a state, after each checkpoint, and from the whole of it a
picture for each environment; prints the shares of states above two thresholds, and the mean with
its standard error between checkpoints, since the states of one are alike. The same command again
measures only what the table lacks: delete the table to measure runs that were trained afresh.
Norms are in return per unit of action; the cosine similarity is empty where a gradient is exactly
0, and counts as below every τ.
"""

import argparse
import functools
import json
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import matplotlib
import mujoco
import numpy as np
import pandas as pd
import torch
from gymnasium.envs.mujoco import MujocoEnv
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

import td3_hyper  # noqa: E402
from hypernet import CRITICS  # noqa: E402
from td3_hyper import stop  # noqa: E402

STD = 0.3  # of the actions around π(s), in half widths of the action range (released)
RUN = ["env_id", "critic", "seed"]
SETTINGS = ["num_states", "num_actions", "hold", "exp_name"]  # the same in every row of a table
COLUMNS = [*RUN, "step", "state", "cosine_similarity", "norm_true", "norm_critic", *SETTINGS]
COLOURS = {  # Okabe and Ito's, safe for the colour-blind
    "mlp": "#000000",
    "mlp-small": "#56b4e9",
    "mlp-large": "#e69f00",
    "resnet-features": "#009e73",
    "resnet35": "#cc79a7",
    "d2rl": "#999999",
    "as-hyper": "#0072b2",
    "sa-hyper": "#d55e00",
}


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = stop  # in one line
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run directories of td3_hyper.py, or folders of them")
    add("--out", type=Path, default="plots", help="folder of the table and pictures: %(default)s")
    add("--num-states", type=int, default=15, help="states a checkpoint: 15 (paper)")
    add("--num-actions", type=int, default=15, help="rollouts a state: 15 (paper)")
    add("--hold", type=int, default=3, help="steps that a rollout holds its action: 3 (released)")
    args = parser.parse_args()
    for name, least in {"num_states": 1, "num_actions": 3, "hold": 1}.items():
        if getattr(args, name) < least:
            stop(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    return args


@functools.cache
def make_envs(env_id: str, env_kwargs: str, num_states: int, num_actions: int) -> list[gym.Env]:
    """`num_states + num_actions` copies; ends here if the environment does not suit."""
    args = td3_hyper.Args(env_id=env_id, env_kwargs=env_kwargs)
    env = td3_hyper.make_env(args)
    if not isinstance(env.unwrapped, MujocoEnv):
        stop(f"{env_id} is not an environment of MuJoCo: its state cannot be set")
    if (env.spec.max_episode_steps or 0) < 1:
        stop(f"{env_id} {env_kwargs} has no time limit: a rollout might never end")
    dims = env.action_space.shape[0]
    if num_actions < dims + 2:
        stop(
            f"--num-actions {num_actions}: must be at least {dims + 2} for {env_id}, to fit the "
            f"{dims} dimensions of its actions, an intercept and a residual"
        )
    warn = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)  # what the first copy has said already
    envs = [env] + [td3_hyper.make_env(args) for _ in range(num_states + num_actions - 1)]
    mujoco.set_mju_user_warning(warn)
    for env in envs:
        env.reset()
    return envs


def saved_steps(run_dir: Path) -> list[int]:
    """The N of its step_N.pt."""
    names = [file.stem.removeprefix("step_") for file in run_dir.glob("step_*.pt")]
    return sorted(int(name) for name in names if name.isdigit())


def find_runs(folders: list[Path], script=td3_hyper, model: str = "critic") -> dict[tuple, tuple]:
    """(env_id, model, seed) -> (arguments, directory) of each run; ends here if one won't do."""
    runs = {}
    for folder in folders:
        configs = sorted(folder.rglob("config.json"))
        if not configs:
            stop(f"{folder}: no run of {script.__name__}.py there, a directory with a config.json")
        for config in configs:
            try:
                args = script.Args(**json.loads(config.read_text())["args"])
            except (OSError, ValueError, KeyError, TypeError):
                stop(f"{config} does not hold the arguments of a run of {script.__name__}.py")
            if not saved_steps(config.parent):
                stop(f"{config.parent}: no step_N.pt, wait for its end or use --save-every")
            run = (args.env_id, getattr(args, model), args.seed)
            _, other = runs.setdefault(run, (args, config.parent))
            if not other.samefile(config.parent):
                stop(f"{other} and {config.parent} are both {' '.join(map(str, run))}: give one")
    names = {args.exp_name for args, _ in runs.values()}
    if len(names) > 1:
        stop(f"runs of several experiments, {', '.join(sorted(names))}: give those of one")
    return runs


def read_table(file: Path, columns: list[str], settings: dict) -> list[tuple]:
    """The rows measured so far; ends here if it was with other settings."""
    if not file.exists():
        return []
    try:
        table = pd.read_csv(file, dtype={"exp_name": str})[columns]
    except (OSError, ValueError, KeyError):
        stop(f"{file} is not a table of this script, choose another --out")
    for name, value in settings.items():
        if not (table[name] == value).all():
            stop(f"{file} has another {name} than {value}, choose another --out")
    return list(table.itertuples(index=False, name=None))


def load_agent(args: td3_hyper.Args, run_dir: Path, step: int, env: gym.Env) -> td3_hyper.Agent:
    """The networks of step_N.pt; ends here if they are not those of the run."""
    agent = td3_hyper.Agent(env.observation_space.shape[0], env.action_space, args)
    file = run_dir / f"step_{step}.pt"
    try:
        agent.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    except td3_hyper.LOAD_ERRORS as error:
        stop(f"{file} does not hold the networks of {run_dir / 'config.json'}: {error}")
    return agent


def sample_states(envs: list, policy, rng: np.random.Generator, limit: int) -> np.ndarray:
    """Bring each environment to a state of the policy's own distribution: obs (S, obs).

    That is where the policy is after a random number of steps, below `limit`, counted through the
    ends of the episodes (released).
    """
    obs = np.stack([env.reset(seed=int(rng.integers(2**31)))[0] for env in envs])
    num_steps = rng.integers(limit, size=len(envs))
    for step in range(num_steps.max()):
        live = np.flatnonzero(step < num_steps)
        for i, action in zip(live, policy(obs[live])):
            obs[i], _, terminated, truncated, _ = envs[i].step(action)
            if terminated or truncated:
                obs[i], _ = envs[i].reset()
    return obs


def copy_state(source: gym.Env, target: gym.Env) -> None:
    """Put `target` where `source` is, at the same time of its episode.

    All of MuJoCo's data, not positions and velocities alone: Ant's reward reads the torso's place
    from before the last integration, and the solver starts from its last solution.
    """
    mujoco.mj_copyData(target.unwrapped.data, source.unwrapped.model, source.unwrapped.data)
    target.set_wrapper_attr("_elapsed_steps", source.get_wrapper_attr("_elapsed_steps"))


def copy_checked(source: gym.Env, targets: list[gym.Env], action: np.ndarray) -> None:
    """Put all `targets` where `source` is. Both take a step of `action` to see that they agree bit
    for bit, so `source` is left a step ahead."""
    for target in targets:
        copy_state(source, target)
    obs, *rest, _ = source.step(action)
    copied_obs, *copied_rest, _ = targets[0].step(action)
    if not np.array_equal(obs, copied_obs) or rest != copied_rest:
        stop(f"{source.spec.id} does not step alike from a copied state: it hides some of it")
    copy_state(targets[1], targets[0])


def discounted_returns(envs, obs, actions, policy, value, gamma: float, hold: int) -> np.ndarray:
    """Return of each action (N, action) from the one state that all N environments are in: (N,).

    Σ_k γ^k r_k with action i held for `hold` steps of environment i, and π afterwards. Where time,
    not a termination, cuts a rollout after k steps, γ^k value(s_k) stands for the rest.
    """
    obs, actions = np.tile(obs, (len(envs), 1)), actions.copy()
    returns, live, step = np.zeros(len(envs)), np.arange(len(envs)), 0
    while len(live):
        if step >= hold:
            actions[live] = policy(obs[live])
        terminated, truncated = np.zeros((2, len(envs)), bool)
        for i in live:
            obs[i], reward, terminated[i], truncated[i], _ = envs[i].step(actions[i])
            returns[i] += gamma**step * reward
        step += 1
        cut = truncated & ~terminated
        if cut.any():
            returns[cut] += gamma**step * value(obs[cut])
        live = live[~(terminated | truncated)[live]]
    return returns


def estimate_gradient(actions: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """Slope of the linear least-squares fit with intercept: (N, action), (N,) -> (action,).

    The intercept takes up any constant, so the first return may be subtracted: then the slope of
    returns that are all the same is exactly 0.
    """
    inputs = np.column_stack([actions - actions.mean(0), np.ones(len(actions))])
    return np.linalg.lstsq(inputs, returns - returns[0], rcond=None)[0][:-1]


def cosine_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """nan where one of the two is 0."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / norms if norms > 0 else np.nan


def critic_gradient(agent: td3_hyper.Agent, obs: np.ndarray) -> np.ndarray:
    """∇_a Q1(s, a) at a = π(s): (S, obs) -> (S, action)"""
    obs = torch.as_tensor(obs, dtype=torch.float32)
    action = agent.actor(obs).detach().requires_grad_()
    return torch.autograd.grad(agent.critics[0](obs, action).sum(), action)[0].numpy()


@torch.inference_mode()
def target_value(agent: td3_hyper.Agent, obs: np.ndarray) -> np.ndarray:
    """min_i Q'_i(s, π(s)) of the target critics: (N, obs) -> (N,)"""
    obs = torch.as_tensor(obs, dtype=torch.float32)
    action = agent.actor(obs)
    return torch.min(*(critic(obs, action) for critic in agent.target_critics)).numpy()


def rollouts(agent, gamma: float, envs, s, a, hold: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Actions (N, action) around a = π(s) and their returns (N,), all N environments being in s."""

    def policy(obs):
        return td3_hyper.act(agent.actor, obs)

    def value(obs):
        return target_value(agent, obs)

    low, high = agent.actor.low.numpy(), agent.actor.high.numpy()
    epsilon = rng.standard_normal((len(envs), len(a)), dtype=np.float32)
    actions = (a + STD * (high - low) / 2 * epsilon).clip(low, high)
    return actions, discounted_returns(envs, s, actions, policy, value, gamma, hold)


def measure(agent, gamma: float, state_envs, rollout_envs, hold: int, rng) -> list[tuple]:
    """(cosine similarity, norm of the "true" gradient, of the critic's) of each state."""

    def policy(obs):
        return td3_hyper.act(agent.actor, obs)

    obs = sample_states(state_envs, policy, rng, state_envs[0].spec.max_episode_steps)
    rows = []
    for env, s, a, of_critic in zip(state_envs, obs, policy(obs), critic_gradient(agent, obs)):
        copy_checked(env, rollout_envs, a)
        true = estimate_gradient(*rollouts(agent, gamma, rollout_envs, s, a, hold, rng))
        norms = (np.linalg.norm(true), np.linalg.norm(of_critic))
        rows.append((cosine_similarity(true, of_critic), *norms))
    return rows


def plot(env_id: str, table: pd.DataFrame, file: Path) -> None:
    """Fig. 3 for one environment, a curve a critic; all states of all its runs count alike."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
    (threshold, quarter), (three_quarters, mean) = axes
    tau = np.linspace(0, 1, 101)
    for critic in CRITICS:
        runs = table[table.critic == critic]
        if runs.empty:
            continue
        cs = runs.cosine_similarity.to_numpy()
        label = f"{critic} ({runs.seed.nunique()})"
        style = {"color": COLOURS[critic], "linewidth": 2}
        threshold.plot(tau, 100 * (cs[:, None] > tau).mean(0), label=label, **style)
        steps = runs.groupby("step").cosine_similarity
        for axis, least in ((quarter, 0.25), (three_quarters, 0.75)):
            share = 100 * steps.agg(lambda cs, least=least: (cs > least).mean())
            axis.plot(share.index, share, marker=".", **style)
        mean.plot(steps.mean().index, steps.mean(), marker=".", **style)
        quartiles = steps.quantile(0.25), steps.quantile(0.75)
        mean.fill_between(steps.mean().index, *quartiles, color=style["color"], alpha=0.12, lw=0)
    threshold.set(title="(a) states above τ, all steps", xlabel="threshold τ", xlim=(0, 1))
    quarter.set(title="(b) states above τ = 0.25")
    three_quarters.set(title="(c) states above τ = 0.75")
    for axis in (threshold, quarter, three_quarters):
        axis.set_ylabel("states (%)")
        axis.set_ylim(bottom=0)
    mean.set(title="(d) mean and interquartile range", ylabel="cosine similarity")
    mean.axhline(0, color="black", linewidth=0.8)
    for axis in (quarter, three_quarters, mean):
        axis.set_xlabel("environment steps")
        axis.locator_params(axis="x", nbins=5)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    threshold.legend(title="critic (runs)", frameon=False)
    figure.suptitle(f"Cosine similarity of ∇Q and the gradient of the return, {env_id}")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is a crash like any other
    torch.set_num_threads(1)  # batches of 15 gain nothing from more, and wait for busy cores
    runs = find_runs(args.runs)
    sizes = (args.num_states, args.num_actions)
    envs = {run: make_envs(a.env_id, a.env_kwargs, *sizes) for run, (a, _) in runs.items()}
    exp_name = next(iter(runs.values()))[0].exp_name
    settings = dict(zip(SETTINGS, (*sizes, args.hold, exp_name)))
    table_file = args.out / "gradient_accuracy.csv"
    rows = read_table(table_file, COLUMNS, settings)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--out {args.out}: cannot write there: {error}")

    measured = {row[:4] for row in rows}
    todo = [(run, step) for run in sorted(runs) for step in saved_steps(runs[run][1])]
    todo = [(run, step) for run, step in todo if (*run, step) not in measured]
    for run, step in (bar := tqdm(todo, disable=None)):  # a bar on a terminal
        start = time.perf_counter()
        run_args, run_dir = runs[run]
        state_envs, rollout_envs = envs[run][: args.num_states], envs[run][args.num_states :]
        agent = load_agent(run_args, run_dir, step, state_envs[0])
        rng = np.random.default_rng([run_args.seed, step])
        new = measure(agent, run_args.gamma, state_envs, rollout_envs, args.hold, rng)
        rows += [(*run, step, i, *numbers, *settings.values()) for i, numbers in enumerate(new)]
        table = pd.DataFrame(sorted(rows), columns=COLUMNS)
        td3_hyper.write(table_file, table.to_csv(index=False, float_format="%.6g"))
        mean = pd.Series(numbers[0] for numbers in new).mean()
        seconds = time.perf_counter() - start
        bar.write(f"{run_dir} step {step}: mean cosine similarity {mean:.3f} ({seconds:.1f} s)")
        sys.stdout.flush()

    table = pd.DataFrame(rows, columns=COLUMNS)
    cs = table.groupby(["env_id", "critic"]).cosine_similarity
    shares = {f"above {tau}": cs.agg(lambda cs, tau=tau: (cs > tau).mean()) for tau in (0.25, 0.75)}
    of_checkpoint = table.groupby([*RUN, "step"]).cosine_similarity.mean()
    means = {"mean": cs.mean(), "error": of_checkpoint.groupby(["env_id", "critic"]).sem()}
    print(pd.DataFrame({"states": cs.size(), **shares, **means}).round(3).to_string())
    for env_id, of_env in table.groupby("env_id"):
        plot(env_id, of_env, args.out / f"gradient_accuracy_{env_id.replace('/', '-')}.png")
    print(f"{table_file} has {len(rows)} states, those of {len(todo)} checkpoints are new")


if __name__ == "__main__":
    main(parse_args())
