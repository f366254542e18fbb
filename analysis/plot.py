"""Learning curves, final scores and comparisons of runs (paper, Figs. 4, 6 and 7).

    python analysis/plot.py runs/td3_hyper --title "TD3 on HalfCheetah"

Reads eval.csv and config.json of the runs, in {exp_name}/{env_id}/{model}/seed{seed}/, and writes
- learning_curves.png: a thin line for each run, a thick one for the mean of those with one label
  and, from five runs on, the t-distribution's 95% interval; meta-RL: on the test goals;
- train_test_{env_id}.png: meta-RL's training and test goals side by side (Fig. 7);
- dots.png in place of these with --dots: a dot for each run, a bar for the mean of a label;
- final_scores.csv: the scores of each label; comparisons.csv: those of every two labels.

A label is the model and the arguments that differ between runs of one model. The numbers:
- final: mean of a run's evaluations in the last 10% of its steps (meta-RL: of its iterations);
- curve: mean of its evaluations after the random steps (meta-RL: after iteration 0). Both are taken
  over the evaluations that all runs in question have;
- low and high: Welch's 95% interval of the difference a - b of the means over runs; p: two-sided
  permutation test; probability: that a run of a is better than one of b, with its bootstrap 95%
  interval. They are empty where a side has one run;
- normalised: (final - first) / (final - first of the baseline), where first is the first evaluation
  and the baseline the label of mlp or vanilla with the best final score (meta-RL: after
  adaptation); gain_percent: 100 (normalised - 1); reached_at_percent: where the mean curve first
  reaches the baseline's final score, in percent of the baseline's steps. Empty unless the baseline
  has learned, by more than the standard deviation of its final scores over runs.
"""

import itertools
import json
import os
import re
import signal
import sys
import textwrap
from collections import defaultdict
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

# A model has one colour in every picture, hypernetworks orange. The order is that of legends and
# tables.
COLOURS = {"sa-hyper": "#d55e00", "hyper": "#d55e00", "as-hyper": "#009e73", "context": "#0072b2"}
COLOURS |= {"d2rl": "#8c8c8c", "resnet35": "#cc79a7", "resnet-features": "#7b4b2a"}
COLOURS |= {"mlp-large": "#0072b2", "mlp-small": "#56b4e9", "mlp": "#000000", "vanilla": "#000000"}
OTHERS = ["#6a3d9a", "#808000", "#8b0000", "#20b2aa"]  # of models that this project does not have
LINES = ["-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 4))]

# Arguments that are not named in a label, since they do not change what is learned, ...
UNNAMED = {"model", "critic", "env_id", "seed", "exp_name", "runs_dir", "device", "cuda_graph"}
UNNAMED |= {"track", "checkpoint_every", "save_every", "eval_every", "eval_episodes"}
UNNAMED |= {"total_timesteps", "num_iterations"}
# ... those of hypernetworks alone, and one that only this algorithm has
HYPER = {"hyper_init", "primary_widths", "dynamic_width"}
ALGORITHMS = {"policy_frequency": "TD3", "autotune": "SAC", "max_kl": "MAML", "latent_dim": "PEARL"}
WORDS = {
    "learning_starts": "{} random steps",
    "hyper_init": "init {}",
    "precision": "{}",
    "context": "{} context",
    "algorithm": "{}",
    "env_kwargs": "{}",
}
PLACE = ["env_id", "split", "phase", "goal"]
BEFORE, AFTER = "before adaptation", "after adaptation"
DIRECTIONS = {-1: "backward", 1: "forward"}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories, or folders of them"""
    out: Path = Path("plots")
    """folder of the pictures and tables"""
    title: str = ""
    """a sentence that says what the picture shows"""
    dots: bool = False
    """one dot for each run instead of its curve"""
    ignore: tuple[str, ...] = ()
    """arguments that differ and that labels do not name: their runs are taken together"""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("give run directories, or folders of them")


def note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def stop(message: str) -> NoReturn:
    """Exits with one line on stderr and code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def end_quietly() -> None:
    """Lets Ctrl-C and a pipe whose reader is gone end the process without a traceback."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # which nohup and & leave
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def find(folders: tuple[Path, ...], name: str) -> list[Path]:
    """The files of that name, each once, by the first path that leads to it through links."""
    found = {}
    for folder in folders:
        files, seen = [], set()
        for place, below, names in os.walk(folder, followlinks=True):
            if (real := os.path.realpath(place)) in seen:  # a link to a folder that is in here
                below.clear()
                continue
            seen.add(real)
            below.sort()
            files += [Path(place, name)] * (name in names)
        if not files:
            stop(f"{folder}: no {name} in there")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def number(value: float) -> str:
    """As people write it: 10,000, 0.1, 3e-4."""
    if isinstance(value, int) or not 0 < abs(value) < 0.01:
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def in_words(name: str, value) -> str:
    """An argument as a label says it; empty if there is nothing to say."""
    words = name.replace("_", " ")
    if name == "num_adapt_steps":
        return f"{value or 'no'} inner step{'s' * (value > 1)}"
    if isinstance(value, bool):
        return words if value else f"no {words}"
    if isinstance(value, dict):
        value = " ".join(f"{key} {item}" for key, item in value.items())
        return value
    if isinstance(value, list):
        value = "-".join(map(str, value))
    if isinstance(value, (int, float)):
        value = number(value)
    return WORDS.get(name, words + " {}").format(value)


def named(model: str, args: dict, ignore: tuple[str, ...]) -> dict[str, str]:
    """Those of a run's arguments that a label may name, in words."""
    left_out = UNNAMED | {name.replace("-", "_") for name in ignore}
    if "hyper" not in model and model != "resnet-features":
        left_out |= HYPER
    if args.get("buffer_size", 0) >= args.get("total_timesteps", np.inf):
        left_out.add("buffer_size")  # it never gets full
    if args.get("num_adapt_steps") == 0:
        left_out |= {"inner_lr", "first_order"}
    algorithm = next((name for flag, name in ALGORITHMS.items() if flag in args), None)
    args = {"algorithm": algorithm} | args
    kept = {name: value for name, value in args.items() if name not in left_out}
    return {name: in_words(name, value) for name, value in kept.items() if value is not None}


def label(runs: list[tuple[str, str, dict]], ignore: tuple[str, ...] = ()) -> list[str]:
    """The label of each run, given as (env_id, model, arguments): "mlp, critic lr 1e-3".

    It names every argument that differs between runs of one model in one environment, with other
    models, too. What a run does not have in its config.json counts as the same.
    """
    words, values = [named(model, args, ignore) for _, model, args in runs], defaultdict(set)
    for (env_id, model, _), arguments in zip(runs, words):
        for name, value in arguments.items():
            algorithm = None if name == "algorithm" else arguments.get("algorithm")
            values[env_id, model, algorithm, name].add(value)
    differ = {name for (*_, name), different in values.items() if len(different) > 1}
    parts = [[value for name, value in some.items() if name in differ and value] for some in words]
    return [", ".join([model, *more]) for (_, model, _), more in zip(runs, parts)]


def read_run(file: Path) -> pd.DataFrame:
    """A run's mean return over episodes: columns split, phase, goal, time, return, unit.

    Meta-RL: over the goals of a split and, where there are two directions, for each as well.
    """
    table = pd.read_csv(file)
    if "global_step" in table:
        table = table.rename(columns={"global_step": "time"})
        table = table.assign(split="", phase="", goal="", unit="environment steps")
    else:
        table = table.rename(columns={"iteration": "time"}).assign(unit="iterations")
    if not {"time", "split", "phase", "goal", "return"} <= set(table):
        raise ValueError("not the columns of an eval.csv")
    table["phase"] = table.phase.replace({"pre": BEFORE, "post": AFTER})
    tables = [table.assign(goal="")]
    if set(table.goal) == set(DIRECTIONS):
        tables.append(table.assign(goal=table.goal.map(DIRECTIONS)))
    by = ["split", "phase", "goal", "time", "unit"]
    return pd.concat(tables).groupby(by, as_index=False)["return"].mean()


def read(folders: tuple[Path, ...], ignore: tuple[str, ...] = ()) -> pd.DataFrame:
    """A row for each evaluation of each run: env_id, model, label, run (its path), starts (its
    random steps), and the columns of read_run()."""
    tables, runs = [], []
    for file in find(folders, "eval.csv"):
        run = file.parent
        *_, env_id, model, seed = Path(os.path.abspath(run)).parts
        if not re.fullmatch(r"seed\d+", seed):
            stop(f"{file}: must be in exp_name/env_id/model/seedN/")
        config, args = run / "config.json", {}
        try:
            table = read_run(file)
            if config.exists():
                args = dict(json.loads(config.read_text())["args"])
        except (ValueError, OSError, KeyError, TypeError) as error:
            stop(f"{run}: eval.csv or config.json cannot be used: {error!r}")
        if table.empty:
            note(f"not evaluated yet: {run}")
            continue
        if not (run / "summary.json").exists():
            note(f"unfinished: {run}, evaluated up to {table.time.max()}")
        names = {"env_id": env_id, "model": model, "run": str(run)}
        tables.append(table.assign(**names, starts=args.get("learning_starts", 0)))
        runs.append((env_id, model, args))
    if not tables:
        stop("no run in there has been evaluated yet")
    labels = label(runs, ignore)
    order = [*COLOURS, *sorted({model for _, model, _ in runs} - set(COLOURS))]
    keys = sorted((order.index(model), name) for (_, model, _), name in zip(runs, labels))
    table = pd.concat([t.assign(label=name) for t, name in zip(tables, labels)], ignore_index=True)
    table["label"] = pd.Categorical(table.label, list(dict.fromkeys(name for _, name in keys)))
    for column, values in (("split", ["", "test", "train"]), ("phase", ["", BEFORE, AFTER])):
        table[column] = pd.Categorical(table[column], values, ordered=True)
    for env_id, group in table.groupby("env_id"):
        if group.groupby("time").run.nunique().min() < group.run.nunique():
            what = "a mean, a score or a comparison uses the evaluations that all its runs have"
            note(f"{env_id}: the runs have different evaluations, and {what}")
    return table


def in_common(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns at the evaluations that all of these runs have: index time, a column for each run."""
    return runs.pivot(index="time", columns="run", values="return").dropna()


def final_of(returns: pd.DataFrame) -> pd.Series:
    """The final score of each run of in_common()."""
    return returns[10 * returns.index >= 9 * returns.index.max()].mean()


def measure(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each of these runs: label, final, curve."""
    returns, labels = in_common(runs), runs.groupby("run").label.first()
    curve = returns[returns.index > runs.starts.max()].mean()
    return pd.DataFrame({"label": labels, "final": final_of(returns), "curve": curve})


def difference_of_means(a, b, axis=-1):
    return np.mean(a, axis) - np.mean(b, axis)


def probability_of_improvement(a, b, axis=-1):
    """P(A > B), a tie counts half."""
    a, b = np.moveaxis(a, axis, -1)[..., :, None], np.moveaxis(b, axis, -1)[..., None, :]
    return ((a > b) + 0.5 * (a == b)).mean((-2, -1))


def compare(a, b) -> dict[str, float]:
    """Compares the scores of the runs of two labels."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    row = {"runs_a": len(a), "runs_b": len(b), "mean_a": a.mean(), "mean_b": b.mean()}
    row |= {"difference": a.mean() - b.mean(), "low": np.nan, "high": np.nan, "p": np.nan}
    row["probability"] = probability_of_improvement(a, b)
    row |= {"probability_low": np.nan, "probability_high": np.nan}
    if min(len(a), len(b)) < 2:
        return row
    if a.std() + b.std() > 0:
        row["low"], row["high"] = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    seeded = {"vectorized": True, "rng": np.random.default_rng(0)}
    # Exact where there are fewer ways to divide the runs.
    test = stats.permutation_test((a, b), difference_of_means, n_resamples=9999, **seeded)
    bootstrap = {"method": "percentile", "n_resamples": 9999, "batch": 999, **seeded}
    interval = stats.bootstrap((a, b), probability_of_improvement, **bootstrap).confidence_interval
    return row | {
        "p": test.pvalue,
        "probability_low": interval.low,
        "probability_high": interval.high,
    }


def comparisons(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for both measures of every two labels."""
    rows = []
    for place, group in runs.groupby(PLACE):
        of_label = dict(list(group.groupby("label")))
        for a, b in itertools.combinations(of_label, 2):
            both = pd.concat([of_label[a], of_label[b]])
            scores, last = measure(both), in_common(both).index.max()
            for name in ("final", "curve"):
                sides = [scores[name][scores.label == side].dropna() for side in (a, b)]
                if all(map(len, sides)):
                    names = {"measure": name, "last": last, "a": a, "b": b}
                    rows.append(dict(zip(PLACE, place)) | names | compare(*sides))
    return pd.DataFrame(rows)


def against(baseline: pd.DataFrame, returns: pd.DataFrame) -> dict[str, float | str]:
    """Scores of one label relative to the baseline's, both as in_common() gives them."""
    times = baseline.index.intersection(returns.index)
    baseline, mean = baseline.loc[times], returns.loc[times].mean(axis=1)
    first, finals = baseline.head(1).mean(axis=None), final_of(baseline)
    gain = finals.mean() - first
    if not gain > finals.std():  # nan for one run
        return {"normalised": np.nan, "gain_percent": np.nan, "reached_at_percent": ""}
    score = (final_of(mean.to_frame()).item() - first) / gain
    reached = times[(mean - first) / gain >= 1 - 1e-9]  # rounding
    at = f"{100 * reached[0] / times.max():.4g}" if len(reached) else "not reached"
    percent = round(100 * (score - 1), 9) + 0.0  # not -0
    return {"normalised": score, "gain_percent": percent, "reached_at_percent": at}


def final_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each label of each environment, split, phase and goal."""
    rows = []
    for (env_id, goal), group in runs.groupby(["env_id", "goal"]):
        mlp = group[group.model.isin(("mlp", "vanilla")) & (group.split != "train")]
        mlp = [in_common(x) for _, x in mlp[mlp.phase == mlp.phase.max()].groupby("label")]
        baseline = max(mlp, key=lambda returns: final_of(returns).mean(), default=None)
        for (split, phase, name), some in group.groupby(["split", "phase", "label"]):
            row = {"env_id": env_id, "split": split, "phase": phase, "goal": goal, "label": name}
            scores, returns = measure(some), in_common(some)
            row |= {"runs": len(scores), "last": returns.index.max()}
            row |= scores[["final", "curve"]].mean()
            if baseline is not None and split != "train":
                row |= against(baseline, returns)
            rows.append(row | {"finals": " ".join(f"{score:.6g}" for score in scores.final)})
    return pd.DataFrame(rows)


def styles_of(runs: pd.DataFrame) -> dict[str, dict]:
    """Colour (the model) and line style (the rest of the label) of each label."""
    models = runs.groupby("label").model.first()
    others = dict(zip(sorted(set(models) - set(COLOURS)), itertools.cycle(OTHERS)))
    rest = {name: name.removeprefix(model) for name, model in models.items()}
    common = (
        runs.groupby("run").label.first().map(rest).value_counts().index
    )  # solid: the most runs
    lines = dict(zip(common, itertools.cycle(LINES)))
    colours = COLOURS | others
    return {n: {"color": colours[m], "linestyle": lines[rest[n]]} for n, m in models.items()}


def label_steps(axis, unit: str, last: float) -> None:
    """Numbers the x axis in thousands or millions."""
    scale, word = (1e3, " (thousands)") if last >= 1e4 else (1, "")
    scale, word = (1e6, " (millions)") if last >= 1e6 else (scale, word)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / scale:g}")
    axis.set_xlabel(unit + word)


def curves(axis, runs: pd.DataFrame, styles: dict[str, dict] | None = None) -> None:
    """Return over time, a thin line for each run and a thick one for the mean of each label."""
    styles = styles or styles_of(runs)
    for name, some in runs.groupby("label"):
        for _, run in some.sort_values("time").groupby("run"):
            axis.plot(run.time, run["return"], linewidth=0.8, alpha=0.4, **styles[name])
        table = in_common(some)
        mean, number_of_runs = table.mean(axis=1), table.shape[1]
        text = f"{name} ({number_of_runs})"
        axis.plot(mean, linewidth=2.4, label=text, zorder=3, **styles[name])
        if number_of_runs >= 5:
            half = stats.t.ppf(0.975, number_of_runs - 1) * table.sem(axis=1)
            colour = styles[name]["color"]
            axis.fill_between(mean.index, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
    label_steps(axis, runs.unit.iloc[0], runs.time.max())
    axis.set_ylabel("return per episode")
    axis.spines[["top", "right"]].set_visible(False)


def dots(axis, runs: pd.DataFrame, styles: dict[str, dict] | None = None) -> None:
    """Mean of the curve: a dot for each run and a bar for the mean of each label, sorted."""
    styles, table = styles or styles_of(runs), in_common(runs)
    groups = dict(list(measure(runs).groupby("label").curve))
    names = sorted(groups, key=lambda name: groups[name].mean())
    for y, name in enumerate(names):
        colour, values = styles[name]["color"], groups[name]
        axis.plot(values, [y] * len(values), "o", color=colour, alpha=0.5, markeredgewidth=0)
        axis.plot([values.mean()] * 2, [y - 0.35, y + 0.35], color=colour, linewidth=2.4)
    axis.set_yticks(range(len(names)), [f"{name} ({len(groups[name])})" for name in names])
    times = [number(int(t)) for t in table.index[table.index > runs.starts.max()][[0, -1]]]
    axis.set_xlabel(f"mean return at {' to '.join(times)} {runs.unit.iloc[0]}")
    axis.spines[["top", "right"]].set_visible(False)


def legend(figure, runs: pd.DataFrame, styles: dict[str, dict]) -> None:
    """Below the panels, with the number of runs in an environment; makes room for it."""
    counts = runs.groupby(["label", "env_id"]).run.nunique().groupby("label").agg(["min", "max"])
    numbers = {name: " to ".join(map(str, sorted({*pair}))) for name, pair in counts.T.items()}
    texts = [f"{name} ({numbers[name]})" for name in styles]
    lines = [plt.Line2D([], [], linewidth=2.4, **style) for style in styles.values()]
    columns = max(1, 130 // (max(map(len, texts)) + 10))
    how = "thin: one run, thick: the mean of the runs (their number)"
    how += ", band: 95% interval of the mean" if counts["max"].max() >= 5 else ""
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(lines, texts, title=how, **place)
    figure.set_figheight(figure.get_figheight() + 0.4 + 0.22 * -(-len(texts) // columns))


def draw(panels: dict[str, pd.DataFrame], title: str, file: Path, with_dots: bool = False) -> None:
    """A picture of the panels, each with its title."""
    runs = pd.concat(panels.values())
    styles = styles_of(runs)
    columns = 1 if with_dots or len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    height = 1 + 0.27 * runs.label.nunique() if with_dots else 3
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained")
    figure.set_size_inches(9, rows * height + 0.4)
    first = {}
    for axis, (name, panel) in zip(axes.flat, panels.items()):
        (dots if with_dots else curves)(axis, panel, styles)
        axis.set_title(name, fontsize=10)
        same = first.setdefault(panel.env_id.iloc[0], axis)  # one scale for an environment
        if axis is not same:
            (axis.sharex if with_dots else axis.sharey)(same)
        same.autoscale_view()
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    if not with_dots:
        legend(figure, runs, styles)
    title = title or ("A dot is a run, a bar their mean" if with_dots else "Return while learning")
    figure.suptitle("\n".join(textwrap.wrap(title, 85)), x=0.01, ha="left", fontsize=12)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def panels_of(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By environment and, for meta-RL, by direction and phase: test goals."""
    panels = {}
    for env_id, group in runs[runs.split != "train"].groupby("env_id"):
        directed = group.goal.isin(DIRECTIONS.values())
        group = group[directed] if directed.any() else group
        for (phase, goal), panel in group.groupby(["phase", "goal"]):
            words = (env_id, goal, phase if group.phase.nunique() > 1 else "")
            panels[", ".join(filter(None, words))] = panel
    return panels


def save(table: pd.DataFrame, file: Path) -> None:
    table.to_csv(file, index=False, float_format="%.6g")


def main(args: Args) -> None:
    runs = read(args.runs, args.ignore)
    scores, pairs = final_scores(runs), comparisons(runs)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        save(scores, args.out / "final_scores.csv")
        save(pairs, args.out / "comparisons.csv")
        name = "dots" if args.dots else "learning_curves"
        draw(panels_of(runs), args.title, args.out / f"{name}.png", args.dots)
        both = runs[(runs.phase == AFTER) & (runs.goal == "")]
        for env_id, pair in [] if args.dots else both.groupby("env_id"):
            splits = {f"{env_id}, {s} goals": panel for s, panel in pair.groupby("split")}
            directions = (runs[runs.env_id == env_id].goal != "").any()  # the same in both
            if len(splits) == 2 and not directions:
                draw(splits, args.title, args.out / f"train_test_{env_id}.png")
    except OSError as error:
        stop(f"--out {args.out}: cannot write there: {error}")
    shown = scores.drop(columns="finals").replace("", np.nan).dropna(axis="columns", how="all")
    print(shown.round(2).to_string(index=False, na_rep=""))
    print(f"tables and pictures are in {args.out}")


if __name__ == "__main__":
    end_quietly()
    main(tyro.cli(Args, description=__doc__))
