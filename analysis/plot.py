"""Learning curves, normalised scores and training against test goals (paper, Figs. 4, 6 and 7).

    python analysis/plot.py runs/td3_hyper

Reads the eval.csv of the runs, in {exp_name}/{env_id}/{model}/seed{seed}/, and nothing else; writes
- learning_curves.png, .csv: return over steps (Fig. 4), a panel for each environment, a line for
  each model, or for each experiment and model;
- final_scores.csv: final score, gain and steps to the baseline's score in each environment;
- summary.csv: mean normalised scores over the environments of an experiment (Fig. 6);
- train_test_{env_id}.png: meta-RL's training and test goals (Fig. 7).

What the numbers are:
- evaluation: a run's mean return over the episodes (meta-RL: over the goals) of one step;
- learning curve: mean over seeds, with the t-distribution's 95% interval (in the picture of one or
  two seeds: all of them);
- final score: mean of a run's evaluations in the last 10% of the steps (meta-RL: of iterations);
- normalised score: (score - first) / (final - first), where first and final are the mean first
  evaluation and final score of the baseline, mlp (for MAML: vanilla after adaptation). Some returns
  are negative, so a plain ratio to the baseline would mean nothing;
- gain: 100 (mean normalised final score - 1) percent;
- reached at: the step where the mean curve first reaches the baseline's final score, in percent of
  the baseline's steps.

Runs of an environment are compared on the evaluations that all of them have, so the shortest one
sets the length; this is said on stderr, and so are unfinished runs.
"""

import itertools
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import matplotlib
import numpy as np
import pandas as pd
import tyro
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

RUN = ["exp_name", "env_id", "model", "seed"]  # the folders of a run
ENV, CURVE = RUN[:2], [*RUN[:3], "split", "phase"]
# Okabe and Ito's colours, grey in place of yellow; the order is that of legends and tables.
COLOURS = {"mlp": "#000000", "vanilla": "#000000", "sa-hyper": "#d55e00", "as-hyper": "#0072b2"}
COLOURS |= {"context": "#0072b2", "hyper": "#d55e00", "mlp-small": "#56b4e9"}
COLOURS |= {"mlp-large": "#e69f00", "resnet-features": "#009e73", "resnet35": "#cc79a7"}
COLOURS |= {"d2rl": "#999999"}
ORDERS = {"model": [*COLOURS], "split": ["", "train", "test"], "phase": ["", "pre", "post"]}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories, or folders of them"""
    out: Path = Path("plots")
    """folder of the pictures and tables"""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("give run directories, or folders of them")


def note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def stop(message: str) -> NoReturn:
    """Exits with one line on stderr and code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def read_run(file: Path) -> pd.DataFrame:
    """Columns time (global step, or iteration), step, split, phase, return (mean of the rows)."""
    table = pd.read_csv(file)
    if "global_step" in table:
        table = table.rename(columns={"global_step": "time"})
        table = table.assign(step=table.time, split="", phase="")
    table = table.rename(columns={"iteration": "time", "env_steps": "step"})
    if not {"time", "step", "split", "phase", "return"} <= set(table):
        raise ValueError("not the columns of an eval.csv")
    return table.groupby(["time", "split", "phase"], as_index=False)[["step", "return"]].mean()


def read(folders: tuple[Path, ...]) -> pd.DataFrame:
    """A row for each evaluation of each run."""
    files = {}
    for folder in folders:
        found = list(folder.rglob("eval.csv"))
        if not found:
            stop(f"{folder}: no eval.csv in there")
        for file in map(Path.resolve, found):
            run = file.parts[-5:-1]
            if not re.fullmatch(r"seed\d+", run[-1]):
                stop(f"{file}: must be in exp_name/env_id/model/seedN/")
            if files.setdefault(run, file) != file:
                stop(f"{files[run]} and {file} are the same run by their names")
    tables = []
    for run, file in sorted(files.items()):
        try:
            table = read_run(file)
        except (ValueError, OSError) as error:
            stop(f"{file}: {error}")
        if table.empty:
            note(f"not evaluated yet: {'/'.join(run)}")
            continue
        tables.append(table.assign(**dict(zip(RUN, run))))
        if not (file.parent / "summary.json").exists():
            note(f"unfinished: {'/'.join(run)}, evaluated up to {table.time.max()}")
    if not tables:
        stop("no run in there has been evaluated yet")
    runs = pd.concat(tables, ignore_index=True)
    for column, order in ORDERS.items():
        order = [*order, *sorted(set(runs[column]) - set(order))]
        runs[column] = pd.Categorical(runs[column], order, ordered=True)
    return runs


def cut(runs: pd.DataFrame) -> pd.DataFrame:
    """The evaluations that all runs of an environment have."""
    kept = []
    for (exp_name, env_id), group in runs.groupby(ENV):
        times = [set(run.time) for _, run in group.groupby(["model", "seed"])]
        common = set.intersection(*times)
        if not common:
            stop(f"{exp_name}/{env_id}: the runs have no evaluation step in common")
        if common != set.union(*times):
            used = f"only the {len(common)} evaluations that all runs have are used"
            note(f"{exp_name}/{env_id}: {used}, the last at {max(common)}")
        kept.append(group[group.time.isin(common)])
    return pd.concat(kept)


def over_seeds(groups) -> pd.DataFrame:
    """Mean over seeds with its 95% interval."""
    table = groups["return"].agg(seeds="size", mean="mean", sem="sem", min="min", max="max")
    half = table.pop("sem") * stats.t.ppf(0.975, table.seeds - 1)  # nan for one seed
    table.insert(2, "mean_low", table["mean"] - half)
    table.insert(3, "mean_high", table["mean"] + half)
    return table


def in_last_tenth(time, last):
    return 10 * time >= 9 * last


def normalise(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds score (the normalised return) and share (the step in % of the baseline's)."""
    rows = []
    for (exp_name, env_id), group in runs.groupby(ENV):
        models = set(runs[runs.exp_name == exp_name].model)
        baseline = next((name for name in ("mlp", "vanilla") if name in models), "baseline")
        curve = group[(group.model == baseline) & (group.split != "train") & (group.phase != "pre")]
        means = curve.groupby("time")[["step", "return"]].mean()
        first, steps = means["return"].head(1).mean(), means.step.max()
        final = means["return"][in_last_tenth(means.index, means.index.max())].mean()
        if not final > first:
            first = np.nan
            if len(curve):
                note(f"{exp_name}/{env_id}: {baseline} did not learn, no normalised scores")
        rows.append((exp_name, env_id, first, final, steps))
    scale = pd.DataFrame(rows, columns=[*ENV, "first", "final", "steps"])
    runs = runs.merge(scale, how="left", on=ENV)
    score = (runs["return"] - runs["first"]) / (runs.final - runs["first"])
    runs["score"] = score.where(runs.split != "train")
    # Episodes may end early, so that the seeds of one iteration have made different steps.
    runs["share"] = 100 * runs.groupby([*CURVE, "time"]).step.transform("mean") / runs.steps
    return runs.drop(columns=["first", "final", "steps"])


def first_reached(shares: np.ndarray, scores: np.ndarray) -> float:
    """Share of steps at which the normalised scores first reach 1; nan if they do not."""
    reached = shares[scores >= 1 - 1e-9]  # rounding
    return reached[0] if len(reached) else np.nan


def final_scores(runs: pd.DataFrame, finals: pd.DataFrame) -> pd.DataFrame:
    """A row for each learning curve."""
    table = over_seeds(finals.groupby(CURVE))
    curves = runs.groupby([*CURVE, "time"])[["step", "share", "score"]].mean().groupby(CURVE)
    table.insert(0, "steps", curves.step.max())
    table["normalised"] = finals.groupby(CURVE).score.mean()
    table["gain_percent"] = (100 * (table.normalised - 1)).round(9) + 0.0  # not -0
    reached = curves.apply(lambda curve: first_reached(*curve[["share", "score"]].values.T))
    return table.assign(reached_at_percent=reached).reset_index()


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """A row for each model of an experiment: the mean over environments of its final scores."""
    curves = scores.dropna(subset="normalised").groupby(["exp_name", "model", "phase"])
    table = curves[["normalised", "gain_percent"]].mean()
    table.insert(0, "environments", curves.size())
    return table.reset_index()


def styles_of(labels: list[str]) -> dict[str, dict]:
    """A model's own colour; the others have the colours that are left, then dashes."""
    left = [c for c in dict.fromkeys(COLOURS.values()) if c not in map(COLOURS.get, labels)]
    others = itertools.cycle(itertools.product(("-", "--", "-."), left or ["grey"]))
    styles = [("-", COLOURS[label]) if label in COLOURS else next(others) for label in labels]
    return {label: dict(linestyle=s, color=c) for label, (s, c) in zip(labels, styles)}


def draw(curves: pd.DataFrame, by: list[str], file: Path) -> None:
    """Learning curves: a panel for each value of the columns `by`, dotted before adaptation."""
    few = curves.seeds < 3
    low, high = curves.mean_low.mask(few, curves["min"]), curves.mean_high.mask(few, curves["max"])
    labels = curves.model.astype(str)
    if curves.exp_name.nunique() > 1:
        labels = curves.exp_name + " " + labels
    curves = curves.assign(mean_low=low, mean_high=high, label=labels)
    styles = styles_of(list(curves.sort_values(by, kind="stable").label.unique()))
    panels = list(curves.groupby(by))
    rows, columns = -(-len(panels) // 2), min(2, len(panels))
    size = (1 + 3.8 * columns, 1.2 + 2.7 * rows)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for axis, (name, panel) in zip(axes.flat, panels):
        for (label, phase), curve in panel.groupby(["label", "phase"], sort=False):
            style = styles[label] | (dict(linestyle=":") if phase == "pre" else {})
            axis.plot(curve.step, curve["mean"], linewidth=1.8, **style)
            band = dict(facecolor=(style["color"], 0.1), edgecolor=(style["color"], 0.35))
            axis.fill_between(curve.step, curve.mean_low, curve.mean_high, linewidth=0.6, **band)
        # The panels of an environment on one scale; a wide interval must not hide the curves.
        near = curves[curves.env_id == panel.env_id.iloc[0]]
        low, high = near["min"].min(), near["max"].max()
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9)
        seeds = " to ".join(map(str, sorted({panel.seeds.min(), panel.seeds.max()})))
        axis.set_title(f"{' '.join(name).strip()} ({seeds} seed{'s' * (seeds != '1')})")
        axis.set(xlabel="environment steps", ylabel="return per episode")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.suptitle(f"Mean over seeds, {'band from seed to seed' if few.all() else '95% interval'}")
    lines = [plt.Line2D([], [], **style) for style in styles.values()]
    ncols = 2 * columns if max(map(len, styles)) < 16 else columns
    figure.legend(lines, styles, loc="outside lower center", ncols=ncols, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save(table: pd.DataFrame, file: Path) -> None:
    """Writes a table; prints it without its intervals if it is one of scores."""
    for column in {"step", "steps"} & set(table):
        table = table.assign(**{column: table[column].round().astype(int)})
    if "reached_at_percent" in table:
        share = table.reached_at_percent.round(4).astype(object)
        share[share.isna() & table.gain_percent.notna()] = "not reached"
        table = table.assign(reached_at_percent=share)
    table.to_csv(file, index=False, float_format="%.6g")
    if "gain_percent" in table:
        table = table.drop(columns=[name for name in table if name.endswith(("_low", "_high"))])
        table = table.dropna(axis="columns", how="all")  # scores, where there is no baseline
        print(table.round(2).to_string(index=False, na_rep=""))


def main(args: Args) -> None:
    runs = normalise(cut(read(args.runs)))
    is_final = in_last_tenth(runs.time, runs.groupby(CURVE).time.transform("max"))
    finals = runs[is_final].groupby([*CURVE, "seed"])[["return", "score"]].mean().reset_index()
    groups = runs.groupby([*CURVE, "time"])
    curves = over_seeds(groups)
    curves.insert(0, "step", groups.step.mean())
    curves = curves.reset_index().drop(columns="time")
    args.out.mkdir(parents=True, exist_ok=True)
    save(curves, args.out / "learning_curves.csv")
    scores = final_scores(runs, finals)
    save(scores, args.out / "final_scores.csv")
    draw(curves[curves.split != "train"], ["env_id", "phase"], args.out / "learning_curves.png")
    pairs = curves[(curves.split != "") & (curves.phase == "post")]
    for env_id, pair in pairs.groupby("env_id"):
        draw(pair, ["env_id", "split"], args.out / f"train_test_{env_id}.png")
    summary = summarise(scores)
    if len(summary):
        save(summary, args.out / "summary.csv")
    print(f"tables and pictures are in {args.out}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no clean-up
    arguments = tyro.cli(Args, description=__doc__)
    try:
        main(arguments)
    except OSError as error:
        stop(f"--out {arguments.out}: cannot write there: {error}")
