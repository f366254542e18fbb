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
import sys
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

sys.path.insert(0, str(Path(__file__).parents[1]))

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


def chosen_iterations(run_dir: Path, num: int) -> list[int]:
    """The N of `num` of its step_N.pt, evenly spread, or of all."""
    saved = saved_steps(run_dir)
    places = np.linspace(0, len(saved) - 1, min(num, len(saved))).round().astype(int)
    return [saved[place] for place in places]


class Task:
    """The goals of a run, as maml_hyper.py draws them from its seed, and its policy's shape."""

    def __init__(self, args: maml_hyper.Args):
        self.args, rng = args, np.random.default_rng(args.seed)
        self.train_goals = sample_goals(args.env_id, args.num_train_goals, rng, "train")
        test_goals = sample_goals(args.env_id, args.num_test_goals, rng, "test")
        simulation = (torch.get_num_threads(), args.horizon)
        goals = self.train_goals[: args.meta_batch_size]
        self.envs = MetaVectorEnv(args.env_id, goals, args.episodes_per_goal, *simulation)
        self.test_envs = MetaVectorEnv(args.env_id, test_goals, args.eval_episodes, *simulation)
        spaces = self.envs.single_observation_space, self.envs.single_action_space
        self.policy = maml_hyper.Policy(*(space.shape[0] for space in spaces), args)
        self.policy.to(args.device)

    def measure(self, weights: dict, iteration: int, update: int) -> dict[str, float]:
        """The test returns and the KL divergence of one update from the stored weights."""
        args, policy = self.args, self.policy
        policy.load_state_dict(weights)
        # 1 + update, because [seed, 0, 0] would be the stream of the run itself, default_rng(seed)
        rng = np.random.default_rng([args.seed, iteration, 1 + update])
        self.envs.set_goals(rng.choice(self.train_goals, args.meta_batch_size, replace=False))
        rollouts, pre, steps = maml_hyper.adapt_and_sample(policy, self.envs, rng, args)
        post = maml_hyper.make_batch(rollouts[-1], args)
        result = maml_hyper.update(policy, maml_hyper.MetaBatch(pre, steps, post), args)
        if not np.isfinite(result["gradient_norm"]):
            place = f"update {update} at iteration {iteration}"
            maml_hyper.stop(f"the gradient of {place} is not finite", code=1)
        returns = maml_hyper.evaluate(policy, self.test_envs, args)
        pre, post = returns["pre"].mean(), returns.get("post", returns["pre"]).mean()
        return {"pre_return": pre, "post_return": post, "kl": result["kl"]}


def spreads(table: pd.DataFrame) -> pd.DataFrame:
    """The standard deviation of each policy's returns, before and after adaptation."""
    names = ["env_id", "exp_name", "model", "seed", "iteration"]
    table = table.rename(columns={"pre_return": BEFORE, "post_return": AFTER})
    table = table.melt(names, [BEFORE, AFTER], "phase", "return").groupby([*names, "phase"])
    table = table["return"].agg(updates="size", mean="mean", spread="std").reset_index()
    table["phase"] = pd.Categorical(table.phase, [BEFORE, AFTER])
    for name, share in (("low", 0.975), ("high", 0.025)):
        chi2 = stats.chi2.ppf(share, table.updates - 1)
        table[name] = table.spread * np.sqrt((table.updates - 1) / chi2)
    return table.sort_values([*names[:3], "phase", *names[3:]])


def show(table: pd.DataFrame, title: str, file: Path) -> None:
    """Draws the spread over iterations with the panels of plot.py, by family and phase."""
    models = pd.Categorical(table.model, sorted(set(table.model), key=rank), ordered=True)
    run = table.exp_name + table.model + table.seed.astype(str)
    table = table.rename(columns={"iteration": "time", "spread": "return"})
    table = table.assign(label=models, run=run, unit="iterations before the updates")
    table["quantity"] = "standard deviation of the return"
    panels = {", ".join(names): part for names, part in table.groupby(["env_id", "phase"])}
    draw(panels, title or "How far independent updates of one policy spread", file)


def measure_runs(args: Args, folders: list[Path]) -> pd.DataFrame:
    """The rows of all updates of the runs in there."""
    runs, task_of = find_runs(folders, "model", maml_hyper), {}

    def measure(*names) -> list[dict]:
        *run, iteration, update = names
        _, run_args, run_dir = runs[tuple(run)]
        if (*run, iteration) not in task_of:
            tune(run_args.device, run_args.precision)
            task_of.clear()
            task = Task(run_args)
            task_of[*run, iteration] = task, load(task.policy, run_dir / f"step_{iteration}.pt")
        task, weights = task_of[*run, iteration]
        return [task.measure(weights, iteration, update)]

    maml_hyper.keep_freed_memory()
    chosen = {run: chosen_iterations(runs[run][-1], args.num_checkpoints) for run in sorted(runs)}
    todo = [(*r, i, n) for r in chosen for i in chosen[r] for n in range(args.num_updates)]
    settings = {"exp_name": next(iter(runs.values()))[1].exp_name}
    return measure_missing(args.out / "gradient_noise.csv", COLUMNS, KEY, settings, todo, measure)


def main(args: Args) -> None:
    files = [path for path in args.runs if path.suffix == ".csv"]
    tables = [read_table(file, COLUMNS) for file in files]
    folders = [path for path in args.runs if path not in files]
    if folders or not files:
        tables.append(measure_runs(args, folders))
    table = spreads(pd.concat(tables))
    save(table, args.out / "gradient_noise_spread.csv")
    show(table, args.title, args.out / "gradient_noise.png")
    print(table.round(2).to_string(index=False))


if __name__ == "__main__":
    end_quietly()
    main(tyro.cli(Args, description=__doc__))
