"""analysis/plot.py: labels, tables and pictures of runs made up by hand."""

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import plot
import pytest
from helpers import ROOT, assert_refused
from scipy import stats

import maml_hyper
import sac_hyper
import td3_hyper

SCRIPT = ROOT / "analysis" / "plot.py"
MEDIUM, FWD_BACK = "HalfCheetahVelMedium-v0", "HalfCheetahFwdBack-v0"


def write_run(run: Path, lines: list, args: dict) -> None:
    run.mkdir(parents=True)
    (run / "eval.csv").write_text("\n".join(lines) + "\n")
    (run / "config.json").write_text(json.dumps({"args": args}))
    (run / "summary.json").touch()


def write_td3(run: str, returns, runs: str = "runs", **args) -> None:
    """Mean returns at steps 0, 10, 20, ..."""
    rows = [
        f"{10 * i},{k},{value - 3 + 6 * k},7" for i, value in enumerate(returns) for k in (0, 1)
    ]
    write_run(Path(runs, "td3", run), ["global_step,episode,return,length", *rows], args)


def write_meta(run: str, phases: dict, goals=(-1, 1)) -> None:
    """phases: (split, phase) -> mean returns at iterations 0, 1, 2, ...; goal g adds 10 g."""
    lines = ["iteration,env_steps,split,goal,phase,return"]
    for ((split, phase), means), goal in itertools.product(phases.items(), goals):
        lines += [f"{i},{i},{split},{goal},{phase},{x + 10 * goal}" for i, x in enumerate(means)]
    write_run(Path("runs/maml", run), lines, {})


@pytest.fixture
def figures(monkeypatch) -> list:
    """The pictures that are drawn."""
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    return drawn


def table(name: str, *keys: str) -> pd.DataFrame:
    return pd.read_csv(f"out/{name}.csv", dtype={"finals": str}).set_index(list(keys))


def last(figure) -> dict[str, float]:
    """Title -> last value of the last line of a panel."""
    return {axis.get_title(): axis.get_lines()[-1].get_ydata()[-1] for axis in figure.axes}


def of(script, model, **args) -> tuple[str, str, dict]:
    """A run as label() takes it, with the arguments that config.json would have."""
    name = "model" if script is maml_hyper else "critic"
    args = vars(script.Args(**{name: model, "device": "cpu"} | args))
    return "E-v0", model, json.loads(json.dumps(args))


def test_labels_name_the_arguments_that_differ_between_runs_of_one_model():
    td3 = functools.partial(of, td3_hyper)
    rates = [td3("mlp", critic_lr=1e-3), td3("mlp", seed=2), td3("sa-hyper", eval_every=7)]
    words = ["mlp, critic lr 1e-3", "mlp, critic lr 3e-4", "sa-hyper, critic lr 5e-5"]
    assert plot.label(rates) == words
    assert plot.label(rates, ("critic-lr",)) == ["mlp", "mlp", "sa-hyper"]
    assert plot.label(rates[1:]) == ["mlp", "sa-hyper"]  # between models it does not count
    runs = [td3("sa-hyper", learning_starts=10_000, hyper_init="bias")]
    runs += [td3("sa-hyper", primary_widths=(8, 16)), td3("mlp", hyper_init="paper")]
    assert plot.label(runs) == [
        "sa-hyper, primary widths 256-512-1024, init bias, 10,000 random steps",
        "sa-hyper, primary widths 8-16, init released, 1,000 random steps",
        "mlp, 1,000 random steps",  # it has no primary network
    ]
    assert plot.label([td3("mlp"), of(sac_hyper, "mlp")]) == ["mlp, TD3", "mlp, SAC"]
    maml = [of(maml_hyper, "hyper", num_adapt_steps=n) for n in (0, 1)]
    assert plot.label(maml) == ["hyper, no inner step", "hyper, 1 inner step"]


def test_a_comparison_is_scipys_and_the_closed_forms():
    a, b = [5.0, 7.0, 9.0], [1.0, 5.0, 3.0, 3.0]
    row = plot.compare(a, b)
    assert row == plot.compare(a, b)  # the same numbers every time
    variances = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 4
    degrees = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 3)
    half = stats.t.ppf(0.975, degrees) * sum(variances) ** 0.5  # Welch and Satterthwaite
    assert [row["difference"], row["low"], row["high"]] == pytest.approx([4, 4 - half, 4 + half])
    # Of 35 ways to choose three of the seven, {5, 7, 9} has the largest sum, with either 5.
    assert row["p"] == pytest.approx(2 * 2 / 35)
    assert row["probability"] == pytest.approx((3 + 0.5 + 4 + 4) / 12)
    samples = itertools.product(itertools.product(a, repeat=3), itertools.product(b, repeat=4))
    every = [np.mean([(x > y) + (x == y) / 2 for x in a_ for y in b_]) for a_, b_ in samples]
    limits = [row["probability_low"], row["probability_high"]]
    assert limits == pytest.approx(list(np.quantile(every, [0.025, 0.975])), abs=0.05)
    one = plot.compare(a, [6.0])
    assert np.isnan([one["low"], one["high"], one["p"], one["probability_low"]]).all()


def test_scores_and_comparisons_by_hand(run_main):
    for seed, mlp, hyper in ((1, (-10, 0, 10), (-10, 20, 35)), (2, (-10, 4, 30), (-10, 20, 65))):
        write_td3(f"Hard-v0/mlp/seed{seed}", mlp, learning_starts=5)
        write_td3(f"Hard-v0/sa-hyper/seed{seed}", hyper, learning_starts=10)
    for seed, final in enumerate((0, 15, 30)):  # it gains 10, with a spread of 15
        write_td3(f"Flat-v0/mlp/seed{seed}", (5, 9, final))
    write_td3("One-v0/mlp/seed1", (0, 5, 9))
    finished = run_main(SCRIPT, "runs", "--out", "out")
    assert finished.code == 0 and finished.err == ""
    scores = table("final_scores", "env_id", "label")
    hard, mlp = scores.loc["Hard-v0", "sa-hyper"], scores.loc["Hard-v0", "mlp"]
    # The baseline goes from -10 to 20; its final scores spread by 14.
    values = [hard.runs, hard["last"], hard.final, hard.curve, hard.finals]
    assert values == [2, 20, 50, 50, "35 65"]
    assert [hard.normalised, hard.gain_percent, hard.reached_at_percent] == [2, 100, 50]
    assert [mlp.final, mlp.curve, mlp.normalised, mlp.gain_percent] == [20, 11, 1, 0]
    for env_id in ("Flat-v0", "One-v0"):  # its baseline has not learned, or has no spread
        assert scores.loc[(env_id, "mlp"), "normalised":"reached_at_percent"].isna().all()
    # The curve, too, has only what comes after the random steps of both.
    expected = pd.Series(plot.compare([35, 65], [10, 30]))
    for _, row in table("comparisons", "measure").iterrows():
        assert (row.a, row.b, row["last"]) == ("sa-hyper", "mlp", 20)
        assert list(row[expected.index]) == pytest.approx(list(expected), rel=1e-5)


def test_other_lengths_are_compared_on_what_they_share(run_main):
    write_td3("E-v0/mlp/seed0", (0, 10, 20))
    write_td3("E-v0/mlp/seed1", (0, 30))
    write_td3("E-v0/sa-hyper/seed1", (0, 1, 2, 3))
    finished = run_main(SCRIPT, "runs", "--out", "out")
    assert "E-v0: the runs have different evaluations" in finished.err
    scores = table("final_scores", "label")
    assert list(scores["last"]) == [30, 10] and list(scores.final) == [3, 20]
    assert (table("comparisons", "measure").loc["final", ["last", "mean_a"]] == [10, 1]).all()


def test_a_model_has_one_colour_and_a_band_needs_five_runs(run_main, figures):
    assert plot.COLOURS["sa-hyper"] == plot.COLOURS["hyper"] == "#d55e00"
    for seed in range(5):
        write_td3(f"E-v0/mlp/seed{seed}", (seed, 1, 2), critic_lr=1e-3 if seed % 2 else 3e-4)
    for seed in range(4):
        write_td3(f"E-v0/sa-hyper/seed{seed}", (seed, 1, 2), critic_lr=1e-3)
    run_main(SCRIPT, "runs")
    assert not figures[-1].axes[0].collections
    (legend,) = figures[-1].legends
    names = [text.get_text() for text in legend.get_texts()]
    colours = dict(zip(names, [line.get_color() for line in legend.get_lines()]))
    mlp = {f"mlp, critic lr {rate}": "#000000" for rate in ("3e-4 (3)", "1e-3 (2)")}
    assert colours == mlp | {"sa-hyper, critic lr 1e-3 (4)": "#d55e00"}
    run_main(SCRIPT, "runs", "--ignore", "critic_lr")
    (axis,) = figures[-1].axes
    (band,) = axis.collections  # of the five runs of mlp, 0 to 4 at step 0
    half = stats.t.ppf(0.975, 4) * (2.5 / 5) ** 0.5
    assert band.get_datalim(axis.transData).y0 == pytest.approx(2 - half)


def test_meta_rl_has_panels_by_phase_and_direction_and_goals_outside_training(run_main, figures):
    phases = {("test", "pre"): (1, 2), ("test", "post"): (3, 4), ("train", "post"): (5, 6)}
    write_meta(f"{MEDIUM}/hyper/seed1", phases, goals=(2, 2.5))
    write_meta(f"{FWD_BACK}/hyper/seed1", phases)
    run_main(SCRIPT, "runs")
    curves, pair = map(last, figures)
    before, after = "before adaptation", "after adaptation"
    expected = [f"{FWD_BACK}, {d}, {p}" for p in (before, after) for d in ("backward", "forward")]
    expected += [f"{MEDIUM}, {before}", f"{MEDIUM}, {after}"]
    assert curves == dict(zip(expected, (-8, 12, -6, 14, 24.5, 26.5)))
    assert pair == {f"{MEDIUM}, train goals": 28.5, f"{MEDIUM}, test goals": 26.5}


def test_links_are_followed_with_their_names_and_a_run_counts_once(run_main):
    write_td3("E-v0/mlp/seed1", (0, 1), runs="away")
    write_td3("E-v0/mlp/seed2", (0, 2))
    Path("runs/td3/Linked-v0").mkdir()
    Path("runs/td3/Linked-v0/sa-hyper").symlink_to(Path("away/td3/E-v0/mlp").resolve())
    Path("runs/loop").symlink_to(".")
    finished = run_main(SCRIPT, "runs/td3", "runs", "--out", "out")
    assert finished.code == 0 and finished.err == ""
    finals = dict(table("final_scores", "env_id", "label").finals)
    assert finals == {("E-v0", "mlp"): "2", ("Linked-v0", "sa-hyper"): "1"}


def test_bad_use_ends_with_a_message_and_writes_nothing(run_main):
    write_td3("E-v0/mlp/seed1", ())
    write_td3("one", (1, 2), runs="misplaced")
    assert_refused(run_main(SCRIPT, "nowhere"), "nowhere: no eval.csv")
    assert_refused(run_main(SCRIPT, "misplaced"), "exp_name/env_id/model/seedN")
    assert_refused(run_main(SCRIPT, "runs"), "has been evaluated yet")
    assert not any(Path().rglob("*.png"))


def test_closed_output_is_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_td3("E-v0/mlp/seed1", (1, 2))
    for end in (">&-", "2>&-", "| true"):
        command = f"{sys.executable} {SCRIPT} runs --out out {end}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
