"""How noisy the meta-updates of MAML are (paper, Sec. 4.2, Fig. 5), in runs of maml_hyper.py.

    python maml_hyper.py --model hyper --save-every 100
    python analysis/gradient_noise.py runs/maml_hyper

From each of 4 stored policies of a run it makes 50 updates, each from the same policy but on
episodes of its own, with the run's goals and hyperparameters, and evaluates each updated policy on
the test goals, always from the same starts and with the same action noise. How far the 50 returns
spread stands for the noise of the gradient.

Writes gradient_noise.csv, a row for each update. The same command again measures only what it
lacks: delete it to measure runs that were trained afresh. Given in place of runs, such tables are
only drawn. gradient_noise_spread.csv and gradient_noise.png have the standard deviation of each 50
returns with its 95% interval (χ²).
"""

import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # lets two processes share cores

import numpy as np
import pandas as pd
import torch
import tyro
from gradient_accuracy import find_runs, load, measure_missing, read_table, saved_steps
from plot import AFTER, BEFORE, draw, end_quietly, rank, save
from scipy import stats

import maml_hyper
from hypernet import tune
from meta_envs import MetaVectorEnv, sample_goals

KEY = ["env_id", "model", "seed", "iteration", "update"]
COLUMNS = [*KEY, "pre_return", "post_return", "kl", "exp_name"]  # a table has one experiment


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories, folders of them, or tables that are there already"""
    out: Path = Path("plots")
    """folder of the tables and the picture"""
    title: str = ""
    """a sentence that says what the picture shows"""
    num_checkpoints: int = 4
    """stored policies of a run, evenly spread (paper)"""
    num_updates: int = 50
    """independent updates of each (paper)"""

    def __post_init__(self):
        if min(self.num_checkpoints, self.num_updates) < 1:
            raise ValueError("--num-checkpoints and --num-updates must be at least 1")


def draw_goals(args) -> tuple[np.ndarray, np.ndarray]:
    """The training and test goals of a run of MAML or PEARL, as it draws them from its seed."""
    rng = np.random.default_rng(args.seed)
    train_goals = sample_goals(args.env_id, args.num_train_goals, rng, "train")
    return train_goals, sample_goals(args.env_id, args.num_test_goals, rng, "test")


def make_policy_and_envs(args: maml_hyper.Args) -> tuple:
    """A new policy, and environments of a batch of training goals and of all test goals."""
    train_goals, test_goals = draw_goals(args)
    goals, simulation = train_goals[: args.meta_batch_size], (torch.get_num_threads(), args.horizon)
    envs = MetaVectorEnv(args.env_id, goals, args.episodes_per_goal, *simulation)
    test_envs = MetaVectorEnv(args.env_id, test_goals, args.eval_episodes, *simulation)
    spaces = envs.single_observation_space, envs.single_action_space
    return maml_hyper.Policy(*(space.shape[0] for space in spaces), args), envs, test_envs


def update_once(policy, envs, test_envs, rng: np.random.Generator, args) -> dict[str, float]:
    """One update on goals and episodes that `rng` draws: its test returns and KL divergence."""
    train_goals, _ = draw_goals(args)
    envs.set_goals(rng.choice(train_goals, args.meta_batch_size, replace=False))
    rollouts, pre, inner_steps = maml_hyper.adapt_and_sample(policy, envs, rng, args)
    meta_batch = maml_hyper.MetaBatch(pre, inner_steps, maml_hyper.make_batch(rollouts[-1], args))
    result = maml_hyper.update(policy, meta_batch, args)
    if not np.isfinite(result["gradient_norm"]):
        maml_hyper.stop("the gradient of an update is not finite", code=1)
    returns = maml_hyper.evaluate(policy, test_envs, args)
    pre, post = returns["pre"].mean(), returns.get("post", returns["pre"]).mean()
    return {"pre_return": pre, "post_return": post, "kl": result["kl"]}


def spreads(table: pd.DataFrame) -> pd.DataFrame:
    """The standard deviation of each policy's returns, before adaptation and, if any, after it."""
    phases = [BEFORE, AFTER] if any(table.pre_return != table.post_return) else [BEFORE]
    names = ["env_id", "exp_name", "model", "seed", "iteration"]
    table = table.rename(columns={"pre_return": BEFORE, "post_return": AFTER})
    table = table.melt(names, phases, "phase", "return").groupby([*names, "phase"])
    table = table["return"].agg(updates="size", mean="mean", spread="std").reset_index()
    table["phase"] = pd.Categorical(table.phase, [BEFORE, AFTER])
    for name, share in (("low", 0.975), ("high", 0.025)):
        chi2 = stats.chi2.ppf(share, table.updates - 1)
        table[name] = table.spread * np.sqrt((table.updates - 1) / chi2)
    return table.sort_values([*names[:3], "phase", *names[3:]])


def measure_runs(args: Args, folders: list[Path]) -> pd.DataFrame:
    """The rows of all updates of the runs in there."""
    runs = find_runs(folders, "model", maml_hyper)

    def measure(env_id: str, model: str, seed: int, iteration: int, update: int) -> list[dict]:
        _, run_args, run_dir = runs[env_id, model, seed]
        policy, *envs = make_policy_and_envs(run_args)
        load(policy, run_dir / f"step_{iteration}.pt")
        # 1 + update, because [seed, 0, 0] would be the stream of the run itself, default_rng(seed)
        rng = np.random.default_rng([seed, iteration, 1 + update])
        return [update_once(policy, *envs, rng, run_args)]

    tune("cpu", "float32")
    maml_hyper.keep_freed_memory()
    todo = []
    for run, (*_, run_dir) in sorted(runs.items()):
        saved = saved_steps(run_dir)
        places = np.linspace(0, len(saved) - 1, min(args.num_checkpoints, len(saved)))
        chosen = [saved[place] for place in places.round().astype(int)]
        todo += [(*run, i, n) for i in chosen for n in range(args.num_updates)]
    file, settings = args.out / "gradient_noise.csv", {"exp_name": runs[run][1].exp_name}
    return measure_missing(file, COLUMNS, KEY, settings, todo, measure)


def main(args: Args) -> None:
    tables = {path: read_table(path, COLUMNS) for path in args.runs if path.suffix == ".csv"}
    folders = [path for path in args.runs if path not in tables]
    if folders or not tables:
        tables[args.out / "gradient_noise.csv"] = measure_runs(args, folders)
    table = spreads(pd.concat(tables.values()))
    save(table, args.out / "gradient_noise_spread.csv")
    print(table.round(2).to_string(index=False))
    models = pd.Categorical(table.model, sorted(set(table.model), key=rank), ordered=True)
    run = table.exp_name + table.model + table.seed.astype(str)
    table = table.rename(columns={"iteration": "time", "spread": "return"})  # plot.py's names
    table = table.assign(label=models, run=run, unit="iterations before the updates")
    table["quantity"] = "standard deviation of the return"
    panels = {", ".join(names): part for names, part in table.groupby(["env_id", "phase"])}
    draw(panels, args.title, args.out / "gradient_noise.png")


if __name__ == "__main__":
    end_quietly()
    main(tyro.cli(Args, description=__doc__))
