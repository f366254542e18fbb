"""Learning curves, normalised scores and the train/test pair (paper, Figs. 4, 6 and 7).

    python analysis/plot.py runs

From {exp_name}/{env_id}/{model}/seed{seed}/eval.csv alone it writes
- learning_curves_{exp_name}.png and learning_curves.csv, .md: return over steps (Fig. 4);
- final_scores.csv, .md: final score, gain and steps to the baseline's, by environment;
- summary.png, summary.csv, .md, and the picture's curves as summary_curves.csv, .md (Fig. 6);
- train_test_{exp_name}_{env_id}.png and train_test.csv, .md: meta-RL's training and test goals,
  out of distribution in HalfCheetahVelMedium-v0 (Fig. 7).

What the numbers are:
- evaluation: a run's mean return over the episodes (meta-RL: over the goals) of one step;
- learning curve: mean over seeds, with the t-distribution's 95% interval (of two seeds it says
  nothing: their picture has a band from the one to the other);
- final score: mean of a run's evaluations in the last 10% of the steps (meta-RL: of iterations);
- baseline: mlp (MLP-Standard), for MAML vanilla after adaptation;
- normalised score: (score - first) / (final - first), where first and final are the baseline's mean
  first evaluation and final score there: 0 is untrained, 1 is the trained baseline. (The returns of
  some environments are negative, so that a plain ratio to the baseline would mean nothing.)
- gain: 100 (mean normalised final score - 1) percent;
- reached at: the step where the mean curve first reaches the baseline's final score (over
  environments: a mean normalised score of 1), in percent of the baseline's steps;
- mean, median: over environments (those the model has), of the mean over runs;
- IQM: mean of the middle half of all runs;
- probability of improvement: that a run ends above one of the baseline (ties count half), averaged
  over environments;
- their 95% intervals: bootstrap stratified by environment, the normalisation held fixed. These are
  rliable's statistics (Agarwal et al., 2021) by scipy: rliable 1.2.0 needs arch < 8, which does not
  import with pandas 3.

Runs of an environment are compared on the evaluations that all of them have, so that the shortest
one sets the length. An interval needs two runs in each environment, and five to mean much. What is
unfinished, missing or cut is said on stderr.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import matplotlib
import numpy as np
import pandas as pd
import tyro
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402

BASELINES = ("mlp", "vanilla")
SPLITS, PHASES = ("", "train", "test"), ("", "pre", "post")  # "": not meta-RL
ENV, CURVE = ["exp_name", "env_id"], ["exp_name", "env_id", "model", "split", "phase"]
RESAMPLES = 5000
# Okabe and Ito's colours, grey in place of yellow; the order is that of legends and tables.
COLOURS = {"mlp": "#000000", "vanilla": "#000000", "sa-hyper": "#d55e00", "as-hyper": "#0072b2"}
COLOURS |= {"context": "#0072b2", "hyper": "#d55e00", "mlp-small": "#56b4e9"}
COLOURS |= {"mlp-large": "#e69f00", "resnet-features": "#009e73", "resnet35": "#cc79a7"}
COLOURS |= {"d2rl": "#999999"}


@dataclass
class Args:
    """Learning curves, normalised scores and the train/test pair, as pictures and tables."""

    paths: tyro.conf.Positional[tuple[str, ...]]
    """run directories, or folders of them"""
    out: str = "plots"
    """folder of the pictures and tables"""


def stop(message: str) -> NoReturn:
    """Say on stderr in one line what was wrong; exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def read(paths: tuple[str, ...]) -> tuple[pd.DataFrame, list[str]]:
    """A row for each evaluation of each run, and what is to be said about the runs."""
    if not paths:
        stop("give run directories, or folders of them")
    for path in paths:
        if not any(Path(path).rglob("eval.csv")):
            stop(f"{path}: no eval.csv there" if Path(path).is_dir() else f"{path}: no such folder")
    tables, unfinished, seen = [], [], {}
    for file in sorted({file.resolve() for path in paths for file in Path(path).rglob("eval.csv")}):
        run = file.parts[-5:-1]  # exp_name, env_id, model, seed
        if len(run) < 4 or not re.fullmatch(r"seed(0|[1-9]\d*)", run[3]):
            stop(f"{file}: must be in exp_name/env_id/model/seedN/")
        if seen.setdefault(run, file) != file:
            stop(f"{seen[run]} and {file} are the same run by their names")
        try:
            table = read_run(file)
        except (ValueError, OSError) as error:
            stop(f"{file}: {error}")
        if not (file.parent / "summary.json").exists():
            unfinished.append(f"{'/'.join(run)} (evaluated up to step {table.step.max():,.0f})")
        names = dict(zip(("exp_name", "env_id", "model", "seed"), (*run[:3], int(run[3][4:]))))
        tables.append(table.assign(**names))
    runs = pd.concat(tables, ignore_index=True)
    for column, order in (("model", COLOURS), ("split", SPLITS), ("phase", PHASES)):
        order = [*order, *sorted(set(runs[column]) - set(order))]
        runs[column] = pd.Categorical(runs[column], order, ordered=True)
    missing = []
    for exp_name, group in runs.groupby("exp_name"):
        seeds = set(group.seed)
        for env_id in group.env_id.unique():
            for model in group.model.unique():
                there = group[(group.env_id == env_id) & (group.model == model)].seed
                if lost := sorted(seeds - set(there)):
                    missing.append(f"{exp_name}/{env_id}/{model} {' '.join(map(str, lost))}")
    notes = [f"unfinished: {', '.join(unfinished)}"] if unfinished else []
    return runs, notes + ([f"missing seeds: {', '.join(missing)}"] if missing else [])


def read_run(file: Path) -> pd.DataFrame:
    """Columns time (global step, or iteration), step, split, phase, return (mean of the rows)."""
    if not file.read_bytes().endswith(b"\n"):
        raise ValueError("its last line is cut")
    table = pd.read_csv(file)
    if "global_step" in table:
        table = table.rename(columns={"global_step": "time"})
        table = table.assign(step=table.time, split="", phase="")
    else:
        table = table.rename(columns={"iteration": "time", "env_steps": "step"})
    if not {"time", "step", "split", "phase", "return"} <= set(table):
        raise ValueError("not the columns of an eval.csv")
    numbers = table[["time", "step", "return"]].apply(pd.to_numeric).to_numpy(float)
    if not len(table) or not np.isfinite(numbers).all():
        raise ValueError("a number is missing or not finite" if len(table) else "no evaluation")
    if not (table.split.isin(SPLITS) & table.phase.isin(PHASES)).all():
        raise ValueError("split must be train or test, phase pre or post")
    means = table.groupby(["time", "split", "phase"], as_index=False)
    return means.agg({"step": "mean", "return": "mean"})


def cut(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Of each environment the evaluations that all its runs have."""
    kept, notes = [], {}
    for (exp_name, env_id, _, _), group in runs.groupby([*ENV, "split", "phase"]):
        ends = group.groupby(["model", "seed"]).time.max()
        counts = group.time.value_counts()
        times = counts.index[counts == len(ends)]
        if times.empty:
            stop(f"{exp_name}/{env_id}: the runs have no evaluation step in common")
        if len(times) < len(counts):
            last = group[group.time == times.max()].step.mean()
            shortest = "/seed".join(map(str, ends.idxmin()))
            notes[exp_name, env_id] = (
                f"{exp_name}/{env_id}: cut to the evaluations that all runs have, "
                f"{len(times)} up to step {last:,.0f}; shortest: {shortest}"
            )
        kept.append(group[group.time.isin(times)])
    return pd.concat(kept), list(notes.values())


def over_seeds(groups) -> pd.DataFrame:
    """Mean over seeds with its 95% interval."""
    table = groups["return"].agg(seeds="size", mean="mean", sem="sem", min="min", max="max")
    half = table.pop("sem") * stats.t.ppf(0.975, table.seeds - 1)  # nan for one seed
    table.insert(2, "mean_low", table["mean"] - half)
    table.insert(3, "mean_high", table["mean"] + half)
    return table


def in_last_tenth(time, last):
    return 10 * time >= 9 * last


def normalise(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Add baseline, score (the normalised return) and share (the step in % of the baseline's)."""
    rows, notes = [], []
    for (exp_name, env_id), group in runs.groupby(ENV):
        models = set(runs[runs.exp_name == exp_name].model)
        baseline = next((name for name in BASELINES if name in models), " or ".join(BASELINES))
        curve = group[(group.model == baseline) & (group.split != "train") & (group.phase != "pre")]
        means = curve.groupby("time")[["step", "return"]].mean()
        if curve.empty:
            notes.append(f"{exp_name}/{env_id}: no {baseline}, no normalised scores")
            rows.append((exp_name, env_id, "", np.nan, np.nan, np.nan))
            continue
        first, steps = means["return"].iloc[0], means.step.iloc[-1]
        final = means["return"][in_last_tenth(means.index, means.index[-1])].mean()
        if final <= first:
            notes.append(
                f"{exp_name}/{env_id}: the final score of {baseline} is not above its first: "
                "no normalised scores"
            )
            first = np.nan
        rows.append((exp_name, env_id, baseline, first, final, steps))
    scale = pd.DataFrame(rows, columns=[*ENV, "baseline", "first", "final", "steps"])
    runs = runs.merge(scale, how="left", on=ENV)
    score = (runs["return"] - runs["first"]) / (runs.final - runs["first"])
    runs["score"] = score.where(runs.split != "train")
    # Episodes may end early, so that the seeds of one iteration have made different steps.
    runs["share"] = 100 * runs.groupby([*CURVE, "time"]).step.transform("mean") / runs.steps
    return runs.drop(columns=["first", "final", "steps"]), notes


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
    table["gain_percent"] = 100 * (table.normalised - 1)
    reached = curves.apply(lambda curve: first_reached(*curve[["share", "score"]].values.T))
    table["reached_at_percent"] = reached
    return table.reset_index()


def aggregate(*environments: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean, median and interquartile mean of an array of runs for each environment."""
    means = np.stack([scores.mean(axis) for scores in environments])
    iqm = stats.trim_mean(np.concatenate(environments, axis), 0.25, axis)
    return np.stack([means.mean(0), np.median(means, 0), iqm])


def mean_curve(*environments: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean([scores.mean(axis) for scores in environments], axis=0)


def improvement(*environments: np.ndarray, axis: int = -1) -> np.ndarray:
    """P(model > baseline): the model's arrays, then the baseline's."""
    half = len(environments) // 2
    pairs = zip(environments[:half], environments[half:])
    signs = [np.sign(model[..., :, None] - base[..., None, :]) for model, base in pairs]
    return np.mean([(1 + sign.mean((-2, -1))) / 2 for sign in signs], axis=0)


def interval(statistic: Callable, environments: list[np.ndarray]) -> np.ndarray:
    """Stratified bootstrap, 95%: low and high; nan if some environment has a single run."""
    if min(scores.shape[-1] for scores in environments) < 2:
        return np.full((2, *np.shape(statistic(*environments))), np.nan)
    options = dict(axis=-1, n_resamples=RESAMPLES, batch=100, method="percentile", rng=0)
    return np.array(stats.bootstrap(environments, statistic, **options).confidence_interval)


def on_grid(runs: pd.DataFrame, grid: np.ndarray) -> np.ndarray:
    """The scores of an environment's runs at shares of the steps: (grid, seeds)."""
    share = runs.groupby("time").share.first()
    lines = runs.pivot(index="time", columns="seed", values="score").T.values
    return np.stack([np.interp(grid, share, line, np.nan, np.nan) for line in lines], axis=-1)


def summarise(runs: pd.DataFrame, finals: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each model over the environments of an experiment: the numbers, and the mean curves."""
    names = ("mean", "median", "iqm", "probability_of_improvement")
    runs, finals = runs.dropna(subset="score"), finals.dropna(subset="score")
    rows, curves = [], []
    for key, group in finals.groupby(["exp_name", "model", "phase"]):
        row = dict(zip(("exp_name", "model", "phase"), key))
        experiment = runs[runs.exp_name == row["exp_name"]]
        baseline = experiment.model == experiment.baseline
        grid = np.unique(experiment[baseline].share)  # the baseline's evaluations
        own = experiment[(experiment.model == row["model"]) & (experiment.phase == row["phase"])]
        environments = [on_grid(table, grid) for _, table in own.groupby("env_id")]
        curve = mean_curve(*environments)
        inside = ~np.isnan(curve)  # where all environments have evaluations
        low, high = interval(mean_curve, [lines[inside] for lines in environments])
        columns = dict(steps_percent=grid[inside], mean=curve[inside])
        curves.append(pd.DataFrame(row | columns | dict(mean_low=low, mean_high=high)))

        base = finals[(finals.exp_name == row["exp_name"]) & (finals.model == finals.baseline)]
        base = base[(base.phase != "pre") & base.env_id.isin(group.env_id)]
        scores, base_scores = (
            [table.score.to_numpy() for _, table in part.groupby("env_id")]
            for part in (group, base)
        )
        both = scores + base_scores
        values = np.append(aggregate(*scores), improvement(*both))
        lows, highs = np.c_[interval(aggregate, scores), interval(improvement, both)]
        if row["model"] == group.baseline.iloc[0] and row["phase"] != "pre":
            values[-1] = lows[-1] = highs[-1] = np.nan  # the baseline against itself
        row |= dict(environments=len(scores), runs=len(group), gain_percent=100 * (values[0] - 1))
        row["reached_at_percent"] = first_reached(grid, curve)
        for name, value, low, high in zip(names, values, lows, highs):
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows), pd.concat(curves) if curves else pd.DataFrame()


def colours_of(models: list[str]) -> dict[str, str]:
    """The models' colours; a model without one of its own gets one that is left."""
    own = {model: COLOURS[model] for model in models if model in COLOURS}
    left = [colour for colour in dict.fromkeys(COLOURS.values()) if colour not in own.values()]
    left = left or ["#f0e442"]
    others = [model for model in models if model not in own]
    return own | {model: left[i % len(left)] for i, model in enumerate(others)}


def draw(axis: plt.Axes, x: pd.Series, curve: pd.DataFrame, **style) -> None:
    axis.plot(x, curve["mean"], linewidth=1.8, **style)
    band = dict(facecolor=(style["color"], 0.1), edgecolor=(style["color"], 0.35), linewidth=0.6)
    axis.fill_between(x, curve.mean_low, curve.mean_high, **band)


def draw_returns(curves: pd.DataFrame, panels: list[str], title: str, file: Path) -> None:
    """Learning curves, two panels a row, one for each value of the columns `panels`."""
    groups = [(" ".join(key).strip(), table) for key, table in curves.groupby(panels)]
    rows, columns = -(-len(groups) // 2), min(2, len(groups))
    size = (1 + 3.8 * columns, 1 + 2.7 * rows)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    band = "95% interval" if curves.seeds.max() > 2 else "band from seed to seed"
    figure.suptitle(f"{title}: mean over seeds, {band}", fontsize=11)
    colours = colours_of(curves.model.sort_values().unique())
    for axis, (name, table) in zip(axes.flat, groups):
        for model, curve in table.groupby("model"):
            if curve.seeds.max() < 3:
                curve = curve.assign(mean_low=curve["min"], mean_high=curve["max"])
            draw(axis, curve.step, curve, color=colours[model])
        seeds = "-".join(map(str, sorted({table.seeds.min(), table.seeds.max()})))
        axis.set_title(f"{name}, {seeds} seed{'s' * (seeds != '1')}", fontsize=10)
        axis.set(xlabel="environment steps", ylabel="return per episode")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.spines[["top", "right"]].set_visible(False)
        # Pre and post, or train and test, on one scale; a wide interval must not hide the curves.
        near = curves[curves.env_id == table.env_id.iloc[0]]
        low, high = near["min"].min(), near["max"].max()
        axis.set_ylim(low - 0.05 * (high - low + 1), high + 0.05 * (high - low + 1))
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    lines = [Line2D([], [], color=colour) for colour in colours.values()]
    figure.legend(lines, colours, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_summary(summary: pd.DataFrame, curves: pd.DataFrame, file: Path) -> None:
    """A row for each experiment: mean normalised score, IQM, probability of improvement; the names
    beside the IQM are the legend."""
    groups = list(summary.groupby("exp_name"))
    heights = [1.2 + 0.2 * max(6, len(rows)) for _, rows in groups]
    grid = dict(squeeze=False, layout="constrained", width_ratios=(1.7, 1, 1))
    grid |= dict(figsize=(10, 0.7 + sum(heights)), height_ratios=heights)
    figure, axes = plt.subplots(len(groups), 3, **grid)
    for (exp_name, rows), (left, middle, right) in zip(groups, axes):
        colours = colours_of(list(dict.fromkeys(rows.model)))
        labels = [f"{model} {phase}".strip() for model, phase in zip(rows.model, rows.phase)]
        for y, row in enumerate(rows.itertuples()):
            keys = (curves.exp_name == exp_name) & (curves.model == row.model)
            curve = curves[keys & (curves.phase == row.phase)]
            style = dict(color=colours[row.model], linestyle=":" if row.phase == "pre" else "-")
            draw(left, curve.steps_percent, curve, **style)
            for axis, name in ((middle, "iqm"), (right, "probability_of_improvement")):
                ends = [getattr(row, f"{name}_low"), getattr(row, f"{name}_high")]
                axis.plot(ends, [y, y], linewidth=3, alpha=0.5, **style)
                axis.plot(getattr(row, name), y, "o", color=colours[row.model])
        for axis, x in ((middle, 1), (right, 0.5)):
            axis.axvline(x, color="#999999", linewidth=0.8, zorder=0)
            axis.set(yticks=range(len(rows)), yticklabels=labels, ylim=(len(rows) - 0.5, -0.5))
        left.axhline(1, color="#999999", linewidth=0.8, zorder=0)
        left.set(title=exp_name, ylabel="mean normalised score")
        left.set(xlabel="environment steps, % of the baseline's")
        middle.set(xlabel="IQM of final normalised scores")
        right.set(xlabel="P(ends above the baseline)", yticklabels=[], xlim=(-0.05, 1.05))
        right.set(xticks=(0, 0.5, 1))
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def cell(row: dict, name: str) -> str:
    """A number of two decimals, with its interval if it has one."""
    if not isinstance(row[name], float):
        return str(row[name])
    value, low, high = (round(row.get(name + end, np.nan), 2) + 0 for end in ("", "_low", "_high"))
    return "–" if np.isnan(value) else f"{value:.2f}" + f" [{low:.2f}, {high:.2f}]" * (low <= high)


def save(table: pd.DataFrame, stem: Path) -> str:
    """Write a table as CSV and as Markdown, and give the Markdown."""
    for column in {"step", "steps"} & set(table):
        table = table.assign(**{column: table[column].round().astype(int)})
    if "reached_at_percent" in table:
        share = table.reached_at_percent.round(4).astype(object)
        share[share.isna() & table.gain_percent.notna()] = "not reached"
        table = table.assign(reached_at_percent=share)
    table.to_csv(stem.with_suffix(".csv"), index=False, float_format="%.6g")
    columns = [name for name in table if not name.endswith(("_low", "_high"))]
    rows = [[cell(row, name) for name in columns] for row in table.to_dict("records")]
    lines = [columns, ["---"] * len(columns), *rows]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    stem.with_suffix(".md").write_text(markdown)
    return markdown


def main(args: Args) -> None:
    runs, notes = read(args.paths)
    runs, cuts = cut(runs)
    runs, unscored = normalise(runs)
    is_final = in_last_tenth(runs.time, runs.groupby(CURVE).time.transform("max"))
    finals = runs[is_final].groupby([*CURVE, "seed", "baseline"])[["return", "score"]].mean()
    finals = finals.reset_index()
    groups = runs.groupby([*CURVE, "time"])
    curves = over_seeds(groups)
    curves.insert(0, "step", groups.step.mean())
    curves = curves.reset_index().drop(columns="time")
    tables = {"final_scores": final_scores(runs, finals), "learning_curves": curves}
    train_test = curves[(curves.split != "") & (curves.phase == "post")]
    if len(train_test):
        tables["train_test"] = train_test
    summary, summary_curves = summarise(runs, finals)
    if len(summary):
        tables |= {"summary_curves": summary_curves, "summary": summary}

    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            markdown = save(table, out / name)
        for exp_name, table in curves[curves.split != "train"].groupby("exp_name"):
            file = out / f"learning_curves_{exp_name}.png"
            draw_returns(table, ["env_id", "phase"], exp_name, file)
        for (exp_name, env_id), table in train_test.groupby(ENV):
            file = out / f"train_test_{exp_name}_{env_id}.png"
            draw_returns(table, ["split"], f"{exp_name}, {env_id}", file)
        if len(summary):
            draw_summary(summary, summary_curves, out / "summary.png")
            print(markdown)
    except OSError as error:
        stop(f"--out {out}: cannot write there: {error}")
    for note in notes + cuts + unscored:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    box = io.StringIO()  # tyro draws an error as a box of several lines
    try:
        with contextlib.redirect_stderr(box):
            arguments = tyro.cli(Args, description=__doc__)
    except SystemExit as end:
        if end.code:
            stop(box.getvalue().split("╮\n")[-1].split("│ ──")[0].replace("│", " "))
        raise
    main(arguments)
