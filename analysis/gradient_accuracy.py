"""How good the critics' action gradients are (paper, Sec. 3, Fig. 3), in runs of td3_hyper.py.

    python td3_hyper.py --env-id Hopper-v4 --critic sa-hyper --save-every 10000
    python analysis/gradient_accuracy.py runs/td3_hyper

For each step_N.pt, in 15 states of its policy's own distribution, two gradients of Q in the action
at a = π(s) are compared by their cosine similarity:
- the critic's: ∇_a Q1(s, π(s));
- the "true" one: the slope of a linear least-squares fit, with intercept, of return on action, over
  15 rollouts from s. Each draws an action around π(s), clipped to [-1, 1], holds it for 3 steps and
  then follows π to the end of the episode. Where the time limit cuts it after k steps,
  γ^k min_i Q'_i(s_k, π(s_k)) of the target critics stands for the rest. (released, all of it)

The held action moves the return more, but what is fitted is then not quite Q(s, a), after whose
first step the policy takes over; `--hold 1` fits that. `--repeat` makes a second, independent
estimate: if the two agree with a similarity of c on average, no critic can score more than √c, nor
the exact gradient. Runs of sac_hyper.py are measured with their deterministic policy; their critics
count the entropy, which the return does not.

Writes gradient_accuracy.csv, a row for each state. The same command again measures only what it
lacks: delete it to measure runs that were trained afresh. Given in place of runs, or beside them,
such a table is only drawn, in a panel of its own. gradient_accuracy.png has the checkpoints that
all runs of a panel have, each with the mean of its states (Fig. 3d), and gradient_comparisons.csv
compares every two critics as plot.py does, by the mean of a run's checkpoints but step 0, where
nothing is learned yet. The columns:
- cosine_similarity, empty where a gradient is exactly 0;
- similarity_weighted, of both gradients times 1 - π(s)², the slope of the actor's tanh; empty, too,
  where that is 0 in every dimension;
- similarity_of_two, of the two estimates of --repeat;
- saturated, the share of the action's dimensions with |π(s)| > 0.95, where the tanh lets next to no
  gradient through and about half of the perturbed actions are clipped;
- actor_lr of the run: with 0 the policy is fixed.
"""

import functools
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pandas as pd
import torch
import tyro
from gymnasium.envs.mujoco import MujocoEnv
from plot import comparisons, draw, end_quietly, find, note, rank, save
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the files that import this one, too

import sac_hyper
import td3_hyper
from td3_hyper import act, at_end, make_env, q_value, stop

mujoco.set_mju_user_warning(lambda message: None)  # each copy of an environment would repeat them

HERE = {"device": "cpu", "cuda_graph": False, "track": False}  # in place of a run's own arguments
STD = 0.3  # of the actions around π(s), which are in [-1, 1] (released)
RUN = ["env_id", "critic", "seed"]
SIMILARITIES = ["cosine_similarity", "similarity_weighted", "similarity_of_two"]
SETTINGS = ["num_states", "num_actions", "hold", "repeat", "exp_name"]  # the same in every row
COLUMNS = [*RUN, "step", "state", *SIMILARITIES, "saturated", "actor_lr", *SETTINGS]


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories, folders of them, or tables that are there already"""
    out: Path = Path("plots")
    """folder of the tables and the picture"""
    title: str = ""
    """a sentence that says what the picture shows"""
    num_states: int = 15
    """states of a checkpoint (paper)"""
    num_actions: int = 15
    """rollouts of an estimate (paper)"""
    hold: int = 3
    """steps for which a rollout holds its action (released)"""
    repeat: bool = False
    """make a second, independent estimate in every state"""

    def __post_init__(self):
        if min(self.num_states, self.num_actions, self.hold) < 1:
            raise ValueError("--num-states, --num-actions and --hold must be at least 1")


def saved_steps(run_dir: Path) -> list[int]:
    """The N of its step_N.pt; exits if it has none."""
    steps = sorted(int(file.stem.removeprefix("step_")) for file in run_dir.glob("step_*.pt"))
    if not steps:
        stop(f"{run_dir} has no step_N.pt: wait for its end or train with --save-every")
    return steps


def read_config(config: Path, *scripts) -> tuple:
    """Which of the scripts made the run, and its arguments."""
    try:
        saved = json.loads(config.read_text())["args"]
        (script,) = (s for s in scripts if {f.name for f in fields(s.Args)} == set(saved))
        return script, script.Args(**{name: HERE.get(name, saved[name]) for name in saved})
    except (OSError, ValueError, KeyError, TypeError):
        names = " or ".join(f"{script.__name__}.py" for script in scripts)
        stop(f"{config} is missing, or not of a run of {names} of this version")


def find_runs(folders: tuple[Path, ...], model: str, *scripts) -> dict[tuple, tuple]:
    """(env_id, model, seed) -> (script, its arguments, directory) of each run of the scripts."""
    runs = {}
    for config in find(folders, "config.json"):
        script, args = read_config(config, *scripts)
        saved_steps(config.parent)  # exits if there are none
        run = (args.env_id, getattr(args, model), args.seed)
        if run in runs:
            stop(f"{runs[run][-1]} and {config.parent} are both {' '.join(map(str, run))}")
        runs[run] = (script, args, config.parent)
    experiments = sorted({args.exp_name for _, args, _ in runs.values()})
    if len(experiments) > 1:
        stop(f"runs of {' and '.join(experiments)}: give those of one experiment")
    return runs


def read_table(file: Path, columns: list[str]) -> pd.DataFrame:
    """A table that has these columns; exits if there is none."""
    try:
        table = pd.read_csv(file, dtype={"exp_name": str})
        table[columns]
    except (OSError, ValueError, KeyError) as error:
        stop(f"{file} cannot be used: {error}")
    return table


def measure_missing(file: Path, columns, key, settings: dict, todo: list, measure) -> pd.DataFrame:
    """The table in `file`, which must have been measured with these settings, after adding the rows
    of all of `todo`, each named by `key`, that it lacks. measure(*todo) gives them."""
    if not file.exists():
        save(pd.DataFrame(columns=columns), file)  # fails now rather than after measuring
    table = read_table(file, columns)
    for name, value in settings.items():
        if not (table[name] == value).all():
            stop(f"{file} has another {name} than {value}, choose another --out")
    rows = table.to_dict("records")
    measured = {tuple(row[name] for name in key) for row in rows}
    for names in tqdm([names for names in todo if names not in measured], disable=None):
        rows += [dict(zip(key, names)) | row | settings for row in measure(*names)]
        table = pd.DataFrame(rows, columns=columns).sort_values(key, kind="stable")
        td3_hyper.write(file, table.to_csv(index=False, float_format="%.6g"))
    print(f"{file} has {len(table)} rows")
    return table


def make_envs(run_args, number: int) -> list[gym.Env]:
    """Copies of an environment, each after a reset; exits if it does not suit."""
    envs = [make_env(run_args) for _ in range(number)]
    if not isinstance(envs[0].unwrapped, MujocoEnv):
        stop(f"{run_args.env_id} is not an environment of MuJoCo: its state cannot be set")
    if (envs[0].spec.max_episode_steps or 0) < 1:
        stop(f"{run_args.env_id} has no time limit: a rollout might never end")
    for env in envs:
        env.reset()
    return envs


def load(networks: torch.nn.Module, file: Path) -> None:
    """Loads a step_N.pt; exits if it is not of these networks."""
    try:
        networks.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # many kinds, depending on where the damage is
        stop(f"{file} does not hold the networks of this run: {error}")


def sample_states(envs: list, policy, rng: np.random.Generator, limit: int) -> np.ndarray:
    """Brings each environment to a state of the policy's own distribution: obs (S, obs).

    A random number of steps, below `limit`, leads there, through ends of episodes too (released).
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


def copy_state(source: gym.Env, targets: list[gym.Env]) -> None:
    """Puts all `targets` where `source` is, at the same time of its episode.

    All of MuJoCo's data, not positions and velocities alone: Ant's reward reads the torso's place
    from before the last integration, and the solver starts from its last solution.
    """
    for target in targets:
        mujoco.mj_copyData(target.unwrapped.data, source.unwrapped.model, source.unwrapped.data)
        target.set_wrapper_attr("_elapsed_steps", source.get_wrapper_attr("_elapsed_steps"))


def check_copy(source: gym.Env, target: gym.Env, spare: gym.Env, action: np.ndarray) -> None:
    """Exits if a copy does not step exactly as `source`, which stays where it is."""
    copy_state(source, [target, spare])
    obs, *rest, _ = source.step(action)
    copied_obs, *copied_rest, _ = target.step(action)
    if not np.array_equal(obs, copied_obs) or rest != copied_rest:
        stop(f"{source.spec.id} does not step alike from a copied state: it hides some of it")
    copy_state(spare, [source])


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
    """Slope of the least-squares fit, 0 for equal returns: (N, action), (N,) -> (action,)"""
    inputs = np.column_stack([actions - actions.mean(0), np.ones(len(actions))])
    return np.linalg.lstsq(inputs, returns - returns[0], rcond=None)[0][:-1]


def cosine_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """nan where one of the two is 0."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / norms if norms > 0 else np.nan


def compare(a: np.ndarray, critic: np.ndarray, true: np.ndarray, second=None) -> dict[str, float]:
    """The measured columns of a row: of π(s), the critic's gradient and one or two estimates."""
    weight = 1 - a**2
    return {
        "cosine_similarity": cosine_similarity(true, critic),
        "similarity_weighted": cosine_similarity(weight * true, weight * critic),
        "similarity_of_two": np.nan if second is None else cosine_similarity(true, second),
        "saturated": (abs(a) > 0.95).mean(),
    }


def critic_gradient(agent, run_args, obs: np.ndarray) -> np.ndarray:
    """∇_a Q1(s, a) at a = π(s): (S, obs) -> (S, action)"""
    obs = torch.from_numpy(obs)
    action = agent.actor(obs).detach().requires_grad_()
    q = q_value(agent.critics[0], obs, action, run_args)
    return torch.autograd.grad(q.sum(), action)[0].numpy()


@torch.inference_mode()
def target_value(agent, run_args, obs: np.ndarray) -> np.ndarray:
    """min_i Q'_i(s, π(s)) of the target critics: (N, obs) -> (N,)"""
    obs = torch.from_numpy(obs)
    action = agent.actor(obs)
    return torch.min(*(q_value(q, obs, action, run_args) for q in agent.target_critics)).numpy()


def measure(agent, run_args, envs: list[gym.Env], args: Args, step: int) -> list[dict]:
    """The measured columns of each state."""
    policy = functools.partial(act, agent.actor, device="cpu")
    value = functools.partial(target_value, agent, run_args)
    state_envs, copies = envs[: args.num_states], envs[args.num_states :]
    rng = np.random.default_rng([run_args.seed, step])
    obs = sample_states(state_envs, policy, rng, envs[0].spec.max_episode_steps)
    of_critic, rows = critic_gradient(agent, run_args, obs), []
    for i, (env, s, a) in enumerate(zip(state_envs, obs, policy(obs))):
        check_copy(env, *copies[:2], a)
        # 1 + i, because a stream does not change with zeros at the end of its key
        action_rng, estimates = np.random.default_rng([run_args.seed, step, 1 + i]), []
        for _ in range(1 + args.repeat):
            copy_state(env, copies)
            epsilon = action_rng.standard_normal((len(copies), len(a)), dtype=np.float32)
            actions = (a + STD * epsilon).clip(-1, 1)
            rollouts = (copies, s, actions, policy, value, run_args.gamma, args.hold)
            estimates.append(estimate_gradient(actions, discounted_returns(*rollouts)))
        rows.append(compare(a, of_critic[i], *estimates))
    return rows


def show(tables: dict[Path, pd.DataFrame], args: Args) -> None:
    """Draws and compares the runs of the tables, with plot.py, in whose terms `time` is the step,
    `return` the mean similarity of its states, `phase` the policy and `goal` the table."""
    states = [table.assign(goal=str(file)) for file, table in tables.items()]
    states = pd.concat(states, ignore_index=True).reindex(columns=[*COLUMNS, "goal"])
    states["phase"] = np.where(states.actor_lr == 0, "fixed policy", "learning actor")
    critics = pd.Categorical(states.critic, sorted(set(states.critic), key=rank), ordered=True)
    run = states.goal + states.critic + states.seed.astype(str)
    states = states.assign(time=states.step, model=states.critic, label=critics, run=run, starts=0)
    place = ["env_id", "phase", "goal"]
    runs = states.groupby(place).run.transform("nunique")
    common = states.groupby([*place, "time"]).run.transform("nunique") == runs
    if not common.all():
        note(f"not all runs of a panel have steps {sorted(set(states.time[~common]))}: left out")
    states = states[common]
    if states.empty:
        stop("no checkpoint that all runs of a panel have: train with --save-every")
    columns = [*place, "label", "model", "run", "starts", "time"]
    runs = states.groupby(columns)[SIMILARITIES].mean().reset_index()
    runs = runs.assign(unit="environment steps", quantity="cosine similarity")
    panels, levels = {}, {}
    for (env_id, policy, file), part in runs.groupby(place):
        name = f"{env_id}, {policy}"
        name += f", {file}" * (name in panels)
        panels[name] = part.rename(columns={"cosine_similarity": "return"})
        best = part.similarity_of_two[part.time > 0].mean()  # nan without --repeat
        levels[name] = {"chance": 0} | ({"best\npossible": best**0.5} if best > 0 else {})
    runs = runs.melt(columns, SIMILARITIES[:2], "split", "return").dropna()
    names = {"split": "similarity", "phase": "policy", "goal": "table"}
    table = comparisons(runs).rename(columns=names)
    save(table[table.measure == "curve"], args.out / "gradient_comparisons.csv")
    draw(panels, args.title, args.out / "gradient_accuracy.png", levels=levels)
    states = states[states.time > 0].groupby([*place, "critic"])
    print(states[[*SIMILARITIES, "saturated"]].mean().round(3).to_string())


def measure_runs(args: Args, folders: list[Path]) -> pd.DataFrame:
    """The rows of all checkpoints of the runs in there."""
    runs = find_runs(folders, "critic", td3_hyper, sac_hyper)
    for _, run_args, _ in runs.values():
        (env,) = make_envs(run_args, 1)
        if args.num_actions < (minimum := env.action_space.shape[0] + 2):
            stop(f"--num-actions must be at least {minimum} for {run_args.env_id}")
    settings = {name: (vars(args) | vars(run_args))[name] for name in SETTINGS}

    def measure_checkpoint(env_id: str, critic: str, seed: int, step: int) -> list[dict]:
        script, run_args, run_dir = runs[env_id, critic, seed]
        envs = make_envs(run_args, args.num_states + args.num_actions)
        dims = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
        agent = script.Agent(*dims, run_args)
        load(agent, run_dir / f"step_{step}.pt")
        rows = measure(agent, run_args, envs, args, step)
        at_end.close()  # the environments of this checkpoint
        return [{"state": i, "actor_lr": run_args.actor_lr} | row for i, row in enumerate(rows)]

    todo = [(*run, step) for run in sorted(runs) for step in saved_steps(runs[run][-1])]
    table = args.out / "gradient_accuracy.csv", COLUMNS, [*RUN, "step"], settings
    return measure_missing(*table, todo, measure_checkpoint)


def main(args: Args) -> None:
    torch.set_num_threads(1)  # batches of 15 gain nothing from more, and wait for busy cores
    columns = [*RUN, "step", "cosine_similarity"]  # older tables lack some of the others
    tables = {path: read_table(path, columns) for path in args.runs if path.suffix == ".csv"}
    folders = [path for path in args.runs if path not in tables]
    if folders or not tables:
        tables[args.out / "gradient_accuracy.csv"] = measure_runs(args, folders)
    show(tables, args)


if __name__ == "__main__":
    end_quietly()
    main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
