"""How noisy the meta-updates of MAML are (paper, Sec. 4.2, Fig. 5), in runs of maml_hyper.py.

    python maml_hyper.py --model hyper --save-every 100
    python analysis/gradient_noise.py runs/maml_hyper

From each of 4 stored policies of a run it makes 50 updates, each from the same policy but on
episodes of its own, with the run's goals and hyperparameters, and evaluates each updated policy on
the test goals, always from the same starts and with the same action noise. How far the 50 returns
spread stands for the noise of the gradient.

Writes gradient_noise.csv, a row for each update, and for each family a violin plot of the runs side
by side, their seeds apart. The same command again measures only what the table lacks: delete the
table to measure runs that were trained afresh.
"""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # lets two processes share cores

import numpy as np
import pandas as pd
import torch
import tyro
from gradient_accuracy import find_runs, load, read_table, save_table, saved_steps
from plot import COLOURS, plt
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import maml_hyper
from hypernet import tune
from meta_envs import MetaVectorEnv, sample_goals

KEY = ["env_id", "model", "seed", "iteration", "update"]
COLUMNS = [*KEY, "pre_return", "post_return", "kl", "exp_name"]  # a table has one experiment


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories, or folders of them"""
    out: Path = Path("plots")
    """folder of the table and the pictures"""
    num_checkpoints: int = 4
    """stored policies of a run, evenly spread (paper)"""
    num_updates: int = 50
    """independent updates of each (paper)"""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("give run directories, or folders of them")
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
        if "kl" not in result:
            place = f"update {update} at iteration {iteration}"
            maml_hyper.stop(f"the gradient of {place} is not finite", code=1)
        returns = maml_hyper.evaluate(policy, self.test_envs, args)
        pre, post = returns["pre"].mean(), returns.get("post", returns["pre"]).mean()
        return {"pre_return": pre, "post_return": post, "kl": result["kl"]}


def plot(env_id: str, table: pd.DataFrame, file: Path) -> None:
    """A violin for each run (model and seed) and checkpoint, before and after adaptation."""
    runs = [(m, s) for m in COLOURS for s in sorted(table[table.model == m].seed.unique())]
    iterations = sorted(table.iteration.unique())
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axis, phase, title in zip(axes, ("pre", "post"), ("before", "after")):
        for (model, seed, iteration), rows in table.groupby(["model", "seed", "iteration"]):
            place = (runs.index((model, seed)) - (len(runs) - 1) / 2) * 0.8 / len(runs)
            position, width = [iterations.index(iteration) + place], 0.7 / len(runs)
            values = rows[f"{phase}_return"]
            violin = axis.violinplot(values, position, widths=width, showmeans=True)
            for part in [*violin.pop("bodies"), *violin.values()]:
                part.set_color(COLOURS[model])
        for model in dict(runs):
            axis.plot([], [], color=COLOURS[model], linewidth=6, alpha=0.5, label=model)
        axis.set_xticks(range(len(iterations)), iterations)
        axis.set(xlabel="iterations of training before the update", title=f"{title} adaptation")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("return of the updated policy")
    axes[0].legend(frameon=False)
    figure.suptitle(f"Independent updates of the same policy, {env_id}, seeds from left to right")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(args: Args) -> None:
    runs = find_runs(args.runs, "model", maml_hyper)
    exp_name = next(iter(runs.values()))[1].exp_name
    file = args.out / "gradient_noise.csv"
    rows = read_table(file, COLUMNS, {"exp_name": exp_name})
    measured = {tuple(row[name] for name in KEY) for row in rows}
    maml_hyper.keep_freed_memory()
    for run, (_, run_args, run_dir) in sorted(runs.items()):
        tune(run_args.device, run_args.precision)
        task, chosen = None, chosen_iterations(run_dir, args.num_checkpoints)
        print(f"{run_dir}: {len(chosen)} of its {len(saved_steps(run_dir))} stored policies")
        for iteration in chosen:
            keys = [(*run, iteration, update) for update in range(args.num_updates)]
            todo = [key for key in keys if key not in measured]
            if not todo:
                continue
            task = task or Task(run_args)
            weights = load(task.policy, run_dir / f"step_{iteration}.pt")
            for key in tqdm(todo, desc=" ".join(map(str, keys[0][:4])), disable=None):
                new = task.measure(weights, iteration, update=key[-1])
                rows.append(dict(zip(KEY, key)) | new | {"exp_name": exp_name})
                save_table(file, COLUMNS, KEY, rows)
            new = [row["post_return"] for row in rows if tuple(row[n] for n in KEY) in keys]
            print(f"iteration {iteration}: test returns {np.mean(new):.1f} ± {np.std(new):.1f}")
            sys.stdout.flush()
    for env_id, table in pd.DataFrame(rows).groupby("env_id"):
        plot(env_id, table, args.out / f"gradient_noise_{env_id}.png")
    print(f"{file} has {len(rows)} updates")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no clean-up
    main(tyro.cli(Args, description=__doc__))
