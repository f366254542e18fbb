"""How noisy the meta-updates of MAML are (paper, Sec. 4.2, Fig. 5), in runs of maml_hyper.py.

    python maml_hyper.py --model hyper --save-every 100
    python analysis/gradient_noise.py runs/maml_hyper

From each of 4 stored policies of a run it makes 50 updates, each from the same policy but on
episodes of its own, with the run's goals and hyperparameters, and evaluates each updated policy on
the test goals, always from the same starts and with the same action noise. How far the 50 returns
spread stands for the noise of the gradient.

Writes gradient_noise.csv, a row an update, and for each family a violin plot of the runs side by
side, their seeds apart. The same command again measures only what the table lacks: delete the table
to measure runs that were trained afresh.
"""

import argparse
import signal
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from gradient_accuracy import find_runs, read_table, saved_steps
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

import maml_hyper  # noqa: E402
from maml_hyper import stop  # noqa: E402
from meta_envs import MetaVectorEnv, sample_goals  # noqa: E402

KEY = ["env_id", "model", "seed", "iteration", "update"]
COLUMNS = [*KEY, "pre_return", "post_return", "kl", "exp_name"]  # one experiment a table
COLOURS = {"vanilla": "#000000", "context": "#0072b2", "hyper": "#d55e00"}  # Okabe and Ito's


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = stop  # in one line
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run directories of maml_hyper.py, or folders of them")
    add("--out", type=Path, default="plots", help="folder of the table and pictures: %(default)s")
    add(
        "--num-checkpoints", type=int, default=4, help="policies of a run, evenly spread: 4 (paper)"
    )
    add("--num-updates", type=int, default=50, help="independent updates of each: 50 (paper)")
    args = parser.parse_args()
    for name in ("num_checkpoints", "num_updates"):
        if getattr(args, name) < 1:
            stop(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    return args


def chosen_iterations(run_dir: Path, num: int) -> list[int]:
    """The N of `num` of its step_N.pt, evenly spread, or of all."""
    saved = saved_steps(run_dir)
    places = np.linspace(0, len(saved) - 1, min(num, len(saved))).round().astype(int)
    return [saved[place] for place in places]


class Run:
    """The tasks of a run, as maml_hyper.py draws them from its seed, and its policy's shape."""

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

    def measure(self, weights: dict, iteration: int, update: int) -> tuple[float, float, float]:
        """(return before adaptation, after it, KL) of one update from the stored weights."""
        self.policy.load_state_dict(weights)
        rng = np.random.default_rng([self.args.seed, iteration, update])
        goals = rng.choice(self.train_goals, self.args.meta_batch_size, replace=False)
        self.envs.set_goals(goals)
        episodes = maml_hyper.adapt_and_sample(self.policy, self.envs, rng, self.args)
        result = maml_hyper.update(self.policy, episodes, self.args)
        maml_hyper.check_finite(iteration, **result)
        eval_rng = np.random.default_rng(self.args.seed + 100)
        test = maml_hyper.adapt_and_sample(self.policy, self.test_envs, eval_rng, self.args)
        returns = test.returns["pre"].mean(), test.returns.get("post", test.returns["pre"]).mean()
        return (*returns, result["kl"])


def plot(env_id: str, table: pd.DataFrame, file: Path) -> None:
    """A violin a run (model and seed) and checkpoint, before and after adaptation."""
    runs = [(m, s) for m in COLOURS for s in sorted(table[table.model == m].seed.unique())]
    iterations = sorted(table.iteration.unique())
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axis, phase in zip(axes, ("pre", "post")):
        for i, (model, seed) in enumerate(runs):
            rows = table[(table.model == model) & (table.seed == seed)]
            for place, iteration in enumerate(iterations):
                values = rows[rows.iteration == iteration][f"{phase}_return"]
                if values.empty:
                    continue
                position = [place + (i - (len(runs) - 1) / 2) * 0.8 / len(runs)]
                width = 0.7 / len(runs)
                violin = axis.violinplot(values, position, widths=width, showmeans=True)
                for part in [*violin["bodies"], *(violin[k] for k in violin if k != "bodies")]:
                    part.set_color(COLOURS[model])
        for model in dict(runs):
            axis.plot([], [], color=COLOURS[model], linewidth=6, alpha=0.5, label=model)
        axis.set_xticks(range(len(iterations)), iterations)
        axis.set_xlabel("iterations of training before the update")
        axis.set_title("before adaptation" if phase == "pre" else "after adaptation")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("return of the updated policy")
    axes[0].legend(frameon=False)
    figure.suptitle(f"Independent updates of the same policy, {env_id}, seeds from left to right")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is a crash like any other
    runs = find_runs(args.runs, maml_hyper, "model")
    exp_name = next(iter(runs.values()))[0].exp_name
    table_file = args.out / "gradient_noise.csv"
    rows = read_table(table_file, COLUMNS, {"exp_name": exp_name})
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--out {args.out}: cannot write there: {error}")
    maml_hyper.fast_matmul()
    maml_hyper.keep_freed_memory()
    for name, (run_args, run_dir) in runs.items():
        if not torch.cuda.is_available():
            run_args.device = "cpu"
        run, chosen = None, chosen_iterations(run_dir, args.num_checkpoints)
        print(f"{run_dir}: {len(chosen)} of its {len(saved_steps(run_dir))} stored policies")
        for iteration in chosen:
            key = (*name, iteration)
            measured = {row[4] for row in rows if row[:4] == key}
            todo = [update for update in range(args.num_updates) if update not in measured]
            if not todo:
                continue
            run = run or Run(run_args)
            file = run_dir / f"step_{iteration}.pt"
            try:
                weights = torch.load(file, weights_only=True, map_location=run_args.device)
                run.policy.load_state_dict(weights)
            except maml_hyper.LOAD_ERRORS as error:
                stop(f"{file} does not hold the policy of {run_dir / 'config.json'}: {error}")
            for update in tqdm(todo, desc=" ".join(map(str, key)), disable=None):
                rows.append((*key, update, *run.measure(weights, iteration, update), exp_name))
                table = pd.DataFrame(sorted(rows), columns=COLUMNS)
                maml_hyper.write(table_file, table.to_csv(index=False, float_format="%.6g"))
            new = [row[6] for row in rows if row[:4] == key]
            print(f"iteration {iteration}: after adaptation {np.mean(new):.1f} ± {np.std(new):.1f}")
            sys.stdout.flush()
    for env_id, table in pd.DataFrame(rows, columns=COLUMNS).groupby("env_id"):
        plot(env_id, table, args.out / f"gradient_noise_{env_id}.png")
    print(f"{table_file} has {len(rows)} updates")


if __name__ == "__main__":
    main(parse_args())
