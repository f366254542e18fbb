"""Learning curves, final scores and comparisons of runs (paper, Figs. 4, 6 and 7).

    python analysis/plot.py runs/td3_hyper --title "TD3 on HalfCheetah"

Reads eval.csv and config.json of the runs, in {exp_name}/{env_id}/{model}/seed{seed}/. A run's
label is its model and the arguments that differ between runs of one model. Writes
- learning_curves.png: the return (meta-RL: on test goals), a thin line for each run, a thick one
  for the mean of a label and, from five runs on, its 95% interval (t-distribution);
- train_test_{env_id}.png: meta-RL's training and test goals side by side (Fig. 7);
- dots.png, in place of these with --dots: a dot for the curve of each run, a bar for their mean;
- final_scores.csv: the scores of each label; comparisons.csv: every two labels compared.

The numbers, over the evaluations that all runs in question have, of which `last` is the last:
- final: mean of a run's evaluations in the last 10% of its steps (meta-RL: of its iterations);
- curve: mean of its evaluations after the random steps (meta-RL: after iteration 0);
- low, high: Welch's 95% interval over runs of a - b; p: its two-sided permutation test;
- probability: that a run of a is better than one of b, with its bootstrap 95% interval;
- normalised: (final - first) / (baseline's final - first), both finals over the evaluations that
  label and baseline share, and first the baseline's first. The baseline is the label of mlp or
  vanilla with the best final score (meta-RL: after adaptation). Empty if it has not learned:
  final - first must exceed the standard deviation of final over its runs. gain_percent:
  100 (normalised - 1). reached_at_percent: the step where the mean first reaches the baseline's
  final score, in percent of the last step that both have.
"""

import itertools
import json
import os
import re
import signal
import sys
import textwrap
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from scipy import stats

plt.switch_backend("Agg")
warnings.filterwarnings("ignore", "Precision loss")  # of runs that are all alike
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# A model has one colour in every picture; legends and tables have this order.
COLOURS = {"sa-hyper": "#d55e00", "hyper": "#d55e00", "as-hyper": "#009e73", "context": "#0072b2"}
COLOURS |= {"d2rl": "#8c8c8c", "resnet35": "#cc79a7", "resnet-features": "#7b4b2a"}
COLOURS |= {"mlp-large": "#0072b2", "mlp-small": "#56b4e9", "mlp": "#000000", "vanilla": "#000000"}
LINES = ["-", "--", ":", "-.", (0, (1, 4)), (0, (8, 4))]

# Arguments that a label never names, since they are in it already or change nothing
UNNAMED = set("model critic env_id seed exp_name runs_dir device cuda_graph track".split())
UNNAMED |= {"total_timesteps", "num_iterations", "checkpoint_every", "save_every"}
UNNAMED |= {"eval_every", "eval_episodes"}
ALGORITHMS = {"policy_frequency": "TD3", "autotune": "SAC", "max_kl": "MAML", "latent_dim": "PEARL"}
WORDS = {"algorithm": "{}", "precision": "{}", "hyper_init": "init {}"}
WORDS |= {"learning_starts": "{} random steps"}

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
    """draw one dot for each run instead of its curve"""
    ignore: tuple[str, ...] = ()
    """arguments that labels do not name, so that runs with either value are taken together"""


def note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def stop(message: str) -> NoReturn:
    """Exits with one line on stderr and code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def end_quietly() -> None:
    """No tracebacks at Ctrl-C, when nobody reads the output any more, or when it is closed."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout, sys.stderr = (f or open(os.devnull, "w") for f in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="replace")  # where it cannot show π


def find(folders: tuple[Path, ...], name: str) -> list[Path]:
    """The files of that name, each once, by the first path that leads to it; follows links."""
    found = {}
    if not folders:
        stop("give run directories, or folders of them")
    for folder in folders:
        files, seen = [], set()
        for place, below, names in os.walk(folder, followlinks=True):
            below.sort()
            if (real := os.path.realpath(place)) in seen:  # a link to what is in this folder
                below.clear()
            elif name in names:
                files.append(Path(place, name))
            seen.add(real)
        if not files:
            stop(f"{folder}: no {name} in there")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def in_words(name: str, value) -> str:
    """An argument as people write it (10,000, 0.1, 3e-4); empty if there is nothing to say."""
    words = name.replace("_", " ")
    if name == "num_adapt_steps":
        return f"{value or 'no'} inner step{'s' * (value > 1)}"
    if isinstance(value, bool):
        return words if value else f"no {words}"
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        value = "-".join(map(str, value))
    elif isinstance(value, float) and 0 < abs(value) < 0.01:
        value = np.format_float_scientific(value, 3, trim="-", exp_digits=1)
    elif isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, int):
        value = f"{value:,}"
    return WORDS.get(name, words + " {}").format(value)


def label(runs: list[tuple[str, str, dict]], ignore: tuple[str, ...] = ()) -> list[str]:
    """The label of each run, given as (env_id, model, arguments): "mlp, critic lr 1e-3".

    It names every argument that differs between runs of one model in one environment, with other
    models, too. An argument that a run's config.json lacks counts as the same.
    """
    words, values = [], defaultdict(set)
    for env_id, model, args in runs:
        left_out = UNNAMED | {name.replace("-", "_") for name in ignore}
        if "hyper" not in model and model != "resnet-features":  # where these have no effect
            left_out |= {"hyper_init", "primary_widths", "dynamic_width"}
        left_out |= {"inner_lr", "first_order"} if args.get("num_adapt_steps") == 0 else set()
        algorithm = next((name for flag, name in ALGORITHMS.items() if flag in args), None)
        named = {"algorithm": algorithm} | {n: v for n, v in args.items() if n not in left_out}
        words.append({n: in_words(n, v) for n, v in named.items() if v is not None})
        for name, value in words[-1].items():
            values[env_id, model, name != "algorithm" and algorithm, name].add(value)
    differ = {name for (*_, name), different in values.items() if len(different) > 1}
    parts = [[value for name, value in some.items() if name in differ and value] for some in words]
    return [", ".join([model, *more]) for (_, model, _), more in zip(runs, parts)]


def rank(model: str) -> int:
    """Its place in legends and tables."""
    return [*COLOURS, model].index(model)


def read_run(file: Path) -> pd.DataFrame:
    """Mean returns: columns split, phase, goal, time, unit of time, return. The goal is empty for
    the mean over all of them; where there are two directions, each has its rows as well."""
    table = pd.read_csv(file).rename(columns={"iteration": "time"}).assign(unit="iterations")
    if "global_step" in table:
        table = table.rename(columns={"global_step": "time"}).assign(unit="environment steps")
        table = table.assign(split="", phase="", goal="")
    table = table.assign(phase=table.phase.replace({"pre": BEFORE, "post": AFTER}))
    directions = [table.assign(goal=table.goal.map(DIRECTIONS))] * (set(table.goal) == {-1, 1})
    table = pd.concat([table.assign(goal=""), *directions])
    return table.groupby([*PLACE[1:], "time", "unit"], as_index=False)["return"].mean()


def read(folders: tuple[Path, ...], ignore: tuple[str, ...] = ()) -> pd.DataFrame:
    """A row for each evaluation of each run: env_id, model, label, run (its directory), starts (its
    random steps) and the columns of read_run()."""
    tables, runs = [], []
    for file in find(folders, "eval.csv"):
        run = file.parent
        *_, env_id, model, seed = Path(os.path.abspath(run)).parts
        if not re.fullmatch(r"seed\d+", seed):
            stop(f"{file}: must be in exp_name/env_id/model/seedN/")
        try:
            table, config = read_run(file), run / "config.json"
            args = dict(json.loads(config.read_text())["args"]) if config.exists() else {}
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            stop(f"{run}: its eval.csv or config.json is not that of a run: {error!r}")
        if table.empty:
            note(f"not evaluated yet: {run}")
            continue
        if not (run / "summary.json").exists():
            note(f"unfinished: {run}, evaluated up to {table.time.max()}")
        row = {"env_id": env_id, "model": model, "run": str(run), "quantity": "return per episode"}
        tables.append(table.assign(**row, starts=args.get("learning_starts", 0)))
        runs.append((env_id, model, args))
    if not tables:
        stop("no run in there has been evaluated yet")
    labels = label(runs, ignore)
    order = sorted({(rank(run[1]), run[1], name) for run, name in zip(runs, labels)})
    table = pd.concat([t.assign(label=name) for t, name in zip(tables, labels)], ignore_index=True)
    orders = {"label": [name for *_, name in order]}
    orders |= {"split": ["", "train", "test"], "phase": ["", BEFORE, AFTER]}
    for column, values in orders.items():
        table[column] = pd.Categorical(table[column], values, ordered=True)
    for env_id, group in table.groupby("env_id"):
        if group.groupby("time").run.nunique().min() < group.run.nunique():
            last = group.groupby("run").time.max().min()
            note(f"{env_id}: the runs have different evaluations, the shortest ends at {last:,}")
    return table


def in_common(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns at the evaluations that all of these runs have: index time, a column for each run."""
    return runs.pivot(index="time", columns="run", values="return").dropna()


def measure(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each of these runs: label, final, curve."""
    returns, labels = in_common(runs), runs.groupby("run").label.first()
    final = returns[10 * returns.index >= 9 * returns.index.max()].mean()
    curve = returns[returns.index > runs.starts.max()].mean()
    return pd.DataFrame({"label": labels, "final": final, "curve": curve})


def improvement(a, b, axis=-1):
    """Share of the pairs of runs in which that of a is better; a tie counts half."""
    a, b = a[..., :, None], b[..., None, :]
    return ((a > b) + 0.5 * (a == b)).mean((-2, -1))


def compare(a, b) -> dict[str, float]:
    """Compares two sets of runs by their scores; the intervals are nan if one has a single run."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    row = {"runs_a": len(a), "runs_b": len(b), "mean_a": a.mean(), "mean_b": b.mean()}
    row |= {"difference": a.mean() - b.mean(), "low": np.nan, "high": np.nan, "p": np.nan}
    row |= {"probability": improvement(a, b), "probability_low": np.nan, "probability_high": np.nan}
    if min(len(a), len(b)) > 1:
        if a.std() + b.std() > 0:
            row["low"], row["high"] = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
        options = {"vectorized": True, "n_resamples": 9999, "rng": np.random.default_rng(0)}
        row["p"] = stats.permutation_test(  # exact for few runs
            (a, b), lambda a, b, axis: a.mean(axis) - b.mean(axis), **options
        ).pvalue
        bootstrap = stats.bootstrap((a, b), improvement, method="percentile", **options)
        row["probability_low"], row["probability_high"] = bootstrap.confidence_interval
    return row


def comparisons(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for both measures of every two labels."""
    rows = []
    for place, group in runs.groupby(PLACE):
        for pair in itertools.combinations(group.label.sort_values().unique(), 2):
            both = group[group.label.isin(pair)]
            scores, last = measure(both), in_common(both).index.max()
            for name in ("final", "curve"):
                sides = [scores[name][scores.label == side].dropna() for side in pair]
                if all(map(len, sides)):
                    names = {"measure": name, "last": last, "a": pair[0], "b": pair[1]}
                    rows.append(dict(zip(PLACE, place)) | names | compare(*sides))
    columns = [*PLACE, "measure", "last", "a", "b", *compare([0], [0])]
    return pd.DataFrame(rows, columns=columns)


def against(baseline: pd.DataFrame, runs: pd.DataFrame) -> dict[str, float | str]:
    """Scores of a label's runs relative to those of the baseline; none if it has not learned."""
    times = in_common(baseline).index.intersection(in_common(runs).index)
    baseline, runs = (table[table.time.isin(times)] for table in (baseline, runs))
    first, finals = in_common(baseline).head(1).mean(axis=None), measure(baseline).final
    gain = finals.mean() - first
    if not gain > finals.std():  # nan for one run
        return {}
    score = (measure(runs).final.mean() - first) / gain
    reached = times[(in_common(runs).mean(axis=1) - first) / gain >= 1 - 1e-9]  # rounding
    at = f"{100 * reached[0] / times.max():.4g}" if len(reached) else "not reached"
    percent = round(100 * (score - 1), 9) + 0.0  # not -0
    return {"normalised": score, "gain_percent": percent, "reached_at_percent": at}


def final_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each label of each environment, split, phase and goal."""
    rows = []
    for (env_id, goal), group in runs.groupby(["env_id", "goal"]):
        mlp = group[group.model.isin(("mlp", "vanilla")) & (group.split != "train")]
        mlp = [some for _, some in mlp[mlp.phase == mlp.phase.max()].groupby("label")]
        baseline = max(mlp, key=lambda some: measure(some).final.mean(), default=None)
        for (split, phase, name), some in group.groupby(["split", "phase", "label"]):
            scores, last = measure(some), in_common(some).index.max()
            row = {"env_id": env_id, "split": split, "phase": phase, "goal": goal, "label": name}
            row |= {"runs": len(scores), "last": last, **scores[["final", "curve"]].mean()}
            row |= dict.fromkeys(("normalised", "gain_percent", "reached_at_percent"))
            if baseline is not None and split != "train":
                row |= against(baseline, some)
            rows.append(row | {"finals": " ".join(f"{score:.6g}" for score in scores.final)})
    return pd.DataFrame(rows)


def styles_of(runs: pd.DataFrame) -> dict[str, dict]:
    """Colour (the model) and line style (the rest of the label, solid for most runs) of a label."""
    labels = runs.groupby("label").agg({"model": "first", "run": "nunique"})
    models = labels.model.str.removesuffix("-oracle")
    rest = {name: name.removeprefix(model) for name, model in models.items()}
    counts = labels.run.groupby(rest, sort=False).sum().sort_values(ascending=False, kind="stable")
    lines = dict(zip(counts.index, itertools.cycle(LINES)))
    colours = {name: COLOURS.get(model, "#6a3d9a") for name, model in models.items()}
    return {name: {"color": colours[name], "linestyle": lines[rest[name]]} for name in labels.index}


def curves(axis, runs: pd.DataFrame, styles: dict[str, dict] | None = None) -> None:
    """Draws a thin line for each run of a panel, a thick one for the mean of a label's runs where
    all have values and, from five runs on, its 95% interval."""
    styles, last = styles or styles_of(runs), runs.time.max()
    for name, some in runs.groupby("label"):
        table, style = some.pivot(index="time", columns="run", values="return"), styles[name]
        for run in table:
            axis.plot(table[run].dropna(), linewidth=0.8, alpha=0.4, **style)
        if "low" in some:  # an interval of each value
            thin = {"color": style["color"], "linewidth": 0.8, "alpha": 0.4}
            axis.vlines(some.time, some.low, some.high, **thin)
        size, table = table.shape[1], table.dropna()
        mean, half = table.mean(axis=1), stats.t.ppf(0.975, size - 1) * table.sem(axis=1)
        axis.plot(mean, linewidth=2.4, label=f"{name} ({size})", zorder=3, **style)
        if size >= 5:
            band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
            axis.fill_between(mean.index, mean - half, mean + half, **band)
    scale, word = (1e3, " (thousands)") if last >= 1e4 else (1, "")
    scale, word = (1e6, " (millions)") if last >= 1e6 else (scale, word)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / scale:g}")
    axis.set(xlabel=runs.unit.iloc[0] + word, ylabel=runs.quantity.iloc[0])


def dots(axis, runs: pd.DataFrame, styles: dict[str, dict] | None = None) -> None:
    """Draws the mean of the curve of these runs, labels sorted, at the evaluations all have."""
    styles, times = styles or styles_of(runs), in_common(runs).index
    times = times[times > runs.starts.max()]
    if times.empty:
        stop("--dots needs an evaluation after the random steps that all runs have")
    groups = dict(list(measure(runs).groupby("label").curve))
    names = sorted(groups, key=lambda name: groups[name].mean())
    for y, name in enumerate(names):
        colour, values = styles[name]["color"], groups[name]
        axis.plot(values, [y] * len(values), "o", color=colour, alpha=0.5, markeredgewidth=0)
        axis.plot([values.mean()] * 2, [y - 0.35, y + 0.35], color=colour, linewidth=2.4)
    axis.set_yticks(range(len(names)), [f"{name} ({len(groups[name])})" for name in names])
    first, last = times[[0, -1]]
    axis.set_xlabel(f"mean return at {first:,} to {last:,} {runs.unit.iloc[0]}, a dot for a run")


def draw(panels: dict, title: str, file: Path, with_dots: bool = False, levels=None) -> None:
    """A picture of the panels, title -> runs; levels: title -> text -> height of a dashed line."""
    styles, same, legend = styles_of(pd.concat(panels.values())), {}, {}
    columns = 1 if with_dots or len(panels) == 1 else 2
    height, rows = 1 + 0.27 * len(styles) if with_dots else 3, -(-len(panels) // columns)
    figure = plt.figure(figsize=(9, 0.4 + height * rows), layout="constrained")
    for i, (name, panel) in enumerate(panels.items(), start=1):
        kind = (panel.env_id.iloc[0], panel.quantity.iloc[0])  # panels of a kind have one scale
        scale = {"sharex" if with_dots else "sharey": same.get(kind)}
        axis = same[kind] = figure.add_subplot(rows, columns, i, **scale)
        (dots if with_dots else curves)(axis, panel, styles)
        axis.set_title(name, fontsize=10)
        for text, y in (levels or {}).get(name, {}).items():
            axis.axhline(y, color="0.5", linewidth=1, linestyle="--", zorder=1)
            place = {"transform": axis.get_yaxis_transform(), "va": "center", "color": "0.4"}
            axis.text(1.01, y, text, fontsize=9, **place)
        lines, texts = axis.get_legend_handles_labels()
        legend |= dict(zip(texts, lines))
    if legend:
        how = "thin: one run, thick: the mean of the runs (their number)"
        how += ", upright: 95% interval of a run" * ("low" in panel)
        bands = any(p.groupby("label").run.nunique().max() >= 5 for p in panels.values())
        how += ", band: 95% interval of the mean" * bands
        ncols = max(1, 130 // (max(map(len, legend)) + 10))
        place = {"loc": "outside lower center", "ncols": ncols, "frameon": False}
        figure.legend(legend.values(), legend, title=how, **place)
        figure.set_figheight(0.8 + height * rows + 0.22 * -(-len(legend) // ncols))
    figure.suptitle("\n".join(textwrap.wrap(title, 100)), x=0.01, ha="left", fontsize=12)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def panels_of(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By environment and, for meta-RL on test goals, by direction and phase where there are two."""
    panels = {}
    for env_id, group in runs[runs.split != "train"].groupby("env_id"):
        group = group[(group.goal != "") == (group.goal != "").any()]
        for (phase, goal), panel in group.groupby(["phase", "goal"]):
            words = (env_id, goal, phase if group.phase.nunique() > 1 else "")
            panels[", ".join(filter(None, words))] = panel
    return panels


def save(table: pd.DataFrame, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(file, index=False, float_format="%.6g")
    except OSError as error:
        stop(f"{file}: cannot be written: {error}")


def main(args: Args) -> None:
    runs = read(args.runs, args.ignore)
    scores = final_scores(runs)
    save(scores, args.out / "final_scores.csv")
    save(comparisons(runs), args.out / "comparisons.csv")
    name = "dots" if args.dots else "learning_curves"
    draw(panels_of(runs), args.title, args.out / f"{name}.png", args.dots)
    for env_id, pair in [] if args.dots else runs[runs.phase == AFTER].groupby("env_id"):
        splits = {f"{env_id}, {s} goals": panel for s, panel in pair.groupby("split")}
        if len(splits) == 2 and not any(pair.goal):  # directions are the same in both
            draw(splits, args.title, args.out / f"train_test_{env_id}.png")
    shown = scores.drop(columns="finals").replace("", np.nan).dropna(axis="columns", how="all")
    print(shown.round(2).to_string(index=False, na_rep=""))
    print(f"tables and pictures are in {args.out}")


if __name__ == "__main__":
    end_quietly()
    main(tyro.cli(Args, description=__doc__))
