"""analysis/plot.py: every number of its tables against one worked out by hand or by enumeration."""

import itertools
import runpy
import shutil
import statistics
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

SCRIPT = ROOT / "analysis" / "plot.py"
# Mean returns at steps 0, 10 and 20 of seeds 1 and 2.
TD3 = {
    ("Hard-v0", "mlp"): [(-10, 0, 10), (-10, 4, 30)],
    ("Hard-v0", "sa-hyper"): [(-10, 20, 35), (-10, 20, 65)],
    ("Easy-v0", "mlp"): [(0, 50, 100), (0, 70, 300)],
    ("Easy-v0", "sa-hyper"): [(0, 100, 100), (0, 140, 200)],
}
# In Hard-v0 the baseline goes from -10 to 20, in Easy-v0 from 0 to 200.
FINAL = {"mlp": [[2 / 3, 4 / 3], [0.5, 1.5]], "sa-hyper": [[1.5, 2.5], [0.5, 1.0]]}


def write_run(run: Path, lines: list, complete: bool = True) -> None:
    run.mkdir(parents=True)
    (run / "eval.csv").write_text("".join(f"{line}\n" for line in lines))
    if complete:
        (run / "summary.json").write_text("{}")


def write_td3(run: Path, returns, steps=None, complete: bool = True) -> None:
    lines = ["global_step,episode,return,length"]
    for step, value in zip(steps or range(0, 10 * len(returns), 10), returns):
        lines += [f"{step},0,{value - 3},7", f"{step},1,{value + 3},9"]
    write_run(run, lines, complete)


@pytest.fixture
def td3(tmp_path):
    for (env_id, model), seeds in TD3.items():
        for seed, returns in enumerate(seeds, start=1):
            write_td3(tmp_path / f"runs/td3_hyper/{env_id}/{model}/seed{seed}", returns)
    return tmp_path / "runs"


def table(name: str, *keys: str) -> pd.DataFrame:
    return pd.read_csv(f"out/{name}.csv").set_index(list(keys)).sort_index()


def exact_interval(statistic, environments) -> tuple[float, float]:
    """The percentile bootstrap without sampling: all resamples, each equally likely."""
    resamples = [list(itertools.product(runs, repeat=len(runs))) for runs in environments]
    values = sorted(statistic(*choice) for choice in itertools.product(*resamples))
    return values[int(0.025 * len(values))], values[int(0.975 * len(values))]


def mean_of_means(*environments) -> float:
    return statistics.mean(statistics.mean(runs) for runs in environments)


def middle_half(*environments) -> float:
    runs = sorted(itertools.chain(*environments))
    cut = len(runs) // 4
    return statistics.mean(runs[cut : len(runs) - cut])


def beats(*environments) -> float:
    """Models' environments, then the baseline's."""
    half = len(environments) // 2
    return statistics.mean(
        statistics.mean((x > y) + (x == y) / 2 for x, y in itertools.product(runs, base))
        for runs, base in zip(environments[:half], environments[half:])
    )


def test_final_scores_by_hand(td3, run_main):
    finished = run_main(SCRIPT, td3, "--out", "out")
    assert finished.code == 0 and finished.err == ""
    final = table("final_scores", "env_id", "model")
    assert (final.steps == 20).all() and (final.seeds == 2).all()
    hard, easy = final.loc["Hard-v0", "sa-hyper"], final.loc["Easy-v0", "sa-hyper"]
    # The standard error of 35 and 65 is 15; the t-distribution's quantile for 2 seeds is 12.7062.
    assert hard["mean"] == 50
    assert [hard.mean_low, hard.mean_high] == pytest.approx([-140.593, 240.593], abs=1e-3)
    assert [hard.normalised, hard.gain_percent] == pytest.approx([2, 100])
    assert float(hard.reached_at_percent) == 50
    assert [easy.normalised, easy.gain_percent] == pytest.approx([0.75, -25])
    assert easy.reached_at_percent == "not reached"
    for env_id in ("Hard-v0", "Easy-v0"):
        baseline = final.loc[env_id, "mlp"]
        assert baseline.normalised == 1 and abs(baseline.gain_percent) < 1e-9
        assert float(baseline.reached_at_percent) == 100


def test_summary_by_hand(td3, run_main):
    finished = run_main(SCRIPT, td3, "--out", "out")
    summary = table("summary", "model")
    model = summary.loc["sa-hyper"]
    assert (model.environments, model.runs) == (2, 4)
    assert model["mean"] == pytest.approx((2 + 0.75) / 2)
    assert model["gain_percent"] == pytest.approx(37.5)
    assert model["median"] == pytest.approx(1.375)
    assert model["iqm"] == pytest.approx((1 + 1.5) / 2)
    # Hard: both runs above both. Easy: one tie, one win, two losses.
    assert model["probability_of_improvement"] == pytest.approx((1 + 1.5 / 4) / 2)
    assert model["reached_at_percent"] == 100
    assert summary.loc["mlp", "mean"] == 1 and np.isnan(summary.probability_of_improvement["mlp"])
    for name, statistic in (("mean", mean_of_means), ("median", mean_of_means)):  # two environments
        for model in FINAL:
            interval = exact_interval(statistic, FINAL[model])
            low_high = summary.loc[model, [f"{name}_low", f"{name}_high"]]
            assert list(low_high) == pytest.approx(interval, abs=1e-5)
    for model in FINAL:
        low_high = summary.loc[model, ["iqm_low", "iqm_high"]]
        assert list(low_high) == pytest.approx(exact_interval(middle_half, FINAL[model]), abs=1e-5)
    low_high = [f"probability_of_improvement_{end}" for end in ("low", "high")]
    interval = exact_interval(beats, FINAL["sa-hyper"] + FINAL["mlp"])
    assert list(summary.loc["sa-hyper", low_high]) == pytest.approx(interval)
    row = "| td3_hyper | sa-hyper |  | 2 | 4 | 37.50 | 100.00 | 1.38 [1.00, 1.75] |"
    assert row in Path("out/summary.md").read_text() and row in finished.out


def test_curves_by_hand(td3, run_main):
    run_main(SCRIPT, td3, "--out", "out")
    curve = table("learning_curves", "env_id", "model").loc[("Hard-v0", "mlp")]
    assert list(curve.step) == [0, 10, 20] and list(curve["mean"]) == [-10, 2, 20]
    assert list(curve.mean_low) == pytest.approx(
        [-10, 2 - 2 * 12.7062, 20 - 10 * 12.7062], abs=1e-3
    )
    curve = table("summary_curves", "model").loc["sa-hyper"]
    assert list(curve.steps_percent) == [0, 50, 100]
    assert list(curve["mean"]) == pytest.approx([0, (30 / 30 + 120 / 200) / 2, 1.375])
    interval = exact_interval(mean_of_means, [[1, 1], [0.5, 0.7]])
    assert [curve.mean_low.iloc[1], curve.mean_high.iloc[1]] == pytest.approx(interval)


def test_statistics_of_three_environments_with_unequal_numbers_of_runs():
    script = runpy.run_path(str(SCRIPT))
    environments = [[1.0, 2.0, 6.0], [10.0, 20.0], [4.0, 5.0, 6.0, 7.0]]
    arrays = [np.array(runs) for runs in environments]
    mean, median, iqm = script["aggregate"](*arrays)
    assert mean == pytest.approx((3 + 15 + 5.5) / 3) and median == 5.5
    assert iqm == pytest.approx((4 + 5 + 6 + 6 + 7) / 5)  # 2 of 9 off at each end
    low, high = script["interval"](script["aggregate"], arrays)
    for i, statistic in enumerate((mean_of_means, None, middle_half)):
        if statistic:
            exact = exact_interval(statistic, environments)
            assert [low[i], high[i]] == pytest.approx(exact, abs=0.15)
    model, base = environments[:2], [[1.5, 2.0], [15.0, 16.0, 30.0]]
    both = [np.array(runs) for runs in model + base]
    assert script["improvement"](*both) == pytest.approx(beats(*model, *base))


def test_final_score_is_the_last_tenth(tmp_path, run_main):
    for seed, tail in ((1, (6, 10)), (2, (20, 40))):
        write_td3(tmp_path / f"runs/td3_hyper/E-v0/mlp/seed{seed}", (*range(9), *tail))
    run_main(SCRIPT, "runs", "--out", "out")
    assert table("final_scores", "model").loc["mlp", "mean"] == (8 + 30) / 2  # steps 90 and 100


def test_other_lengths_missing_seeds_and_unfinished_runs_are_cut_and_said(td3, run_main):
    shutil.rmtree(td3 / "td3_hyper/Easy-v0/sa-hyper/seed2")
    shutil.rmtree(td3 / "td3_hyper/Hard-v0/mlp/seed1")
    write_td3(td3 / "td3_hyper/Hard-v0/mlp/seed1", (-10, 40), complete=False)
    finished = run_main(SCRIPT, td3, "--out", "out")
    unfinished, missing, cut = finished.err.splitlines()
    assert unfinished.endswith("unfinished: td3_hyper/Hard-v0/mlp/seed1 (evaluated up to step 10)")
    assert missing == "note: missing seeds: td3_hyper/Easy-v0/sa-hyper 2"
    assert "td3_hyper/Hard-v0: cut to the evaluations that all runs have, 2 up" in cut
    assert cut.endswith("up to step 10; shortest: mlp/seed1")
    final = table("final_scores", "env_id", "model")
    assert list(final.loc["Hard-v0"]["mean"]) == [22, 20] and final.steps["Hard-v0", "mlp"] == 10
    one = final.loc["Easy-v0", "sa-hyper"]
    assert one.seeds == 1 and one["mean"] == 100 and np.isnan(one.mean_low)
    summary = table("summary", "model").loc["sa-hyper"]
    # 30 of the 32 above the first score in Hard-v0 (both runs), half way in Easy-v0 (one run)
    assert summary["mean"] == pytest.approx((30 / 32 + 0.5) / 2) and summary.runs == 3
    assert np.isnan(summary.mean_low) and np.isnan(summary.probability_of_improvement_low)


def test_runs_evaluated_at_other_steps_are_compared_at_common_ones(td3, run_main):
    write_td3(td3 / "td3_hyper/Hard-v0/d2rl/seed1", (-10, 0, 5, 8, 50), (0, 5, 10, 15, 20))
    write_td3(td3 / "td3_hyper/Hard-v0/d2rl/seed2", (-10, 0, 5, 8, 50), (0, 5, 10, 15, 20))
    finished = run_main(SCRIPT, td3, "--out", "out")
    assert "cut to the evaluations that all runs have, 3 up to step 20" in finished.err
    assert list(table("learning_curves", "model").loc["d2rl"].step) == [0, 10, 20]
    summary = table("summary", "model").loc["d2rl"]  # compared with the baseline's Hard-v0 alone
    assert summary.environments == 1 and summary.probability_of_improvement == 1


def test_environment_without_a_baseline_that_learns_is_not_normalised(td3, run_main):
    write_td3(td3 / "td3_hyper/Flat-v0/mlp/seed1", (5, 9, 4))
    write_td3(td3 / "td3_hyper/Flat-v0/sa-hyper/seed1", (5, 9, 9))
    write_td3(td3 / "other/New-v0/sa-hyper/seed1", (5, 9, 9))
    finished = run_main(SCRIPT, td3, "--out", "out")
    assert "td3_hyper/Flat-v0: the final score of mlp is not above its first" in finished.err
    assert "other/New-v0: no mlp or vanilla, no normalised scores" in finished.err
    final = table("final_scores", "env_id", "model")
    assert final["mean"]["New-v0", "sa-hyper"] == 9 and final["mean"]["Flat-v0", "mlp"] == 4
    assert final.loc[["Flat-v0", "New-v0"], ["normalised", "gain_percent"]].isna().all(axis=None)
    assert final.loc[["Flat-v0", "New-v0"], "reached_at_percent"].isna().all()
    assert list(table("summary", "model").gain_percent) == pytest.approx([0, 37.5])
    finished = run_main(SCRIPT, td3 / "other", "--out", "alone")
    assert finished.code == 0 and not Path("alone/summary.csv").exists()
    assert Path("alone/learning_curves_other.png").exists()


# Mean returns at iterations 0, 1 and 2: test goals before and after adaptation, training goals.
MAML = {
    "vanilla": {"pre": (-9, -9, -8), "post": (-8, -6, -4), "train": (-8, -5, -3)},
    "hyper": {"pre": (-8, -4, -3), "post": (-8, -4, -2), "train": (-8, -6, -3)},
}


def test_meta_rl_is_scored_on_test_goals_and_the_pair_has_both(tmp_path, run_main):
    for model, seed in itertools.product(MAML, (1, 2)):
        lines = ["iteration,env_steps,split,goal,phase,return"]
        for i, (pre, post, train) in enumerate(zip(*MAML[model].values())):
            rows = (("test", "pre", pre), ("test", "post", post), ("train", "post", train))
            for (split, phase, value), goal in itertools.product(rows, (-1, 1)):
                # An episode may end early: the same iteration, other steps for another seed.
                lines.append(f"{i},{(i + 1) * 100 * seed},{split},{goal},{phase},{value + goal}")
        write_run(tmp_path / f"runs/maml_hyper/HalfCheetahVelMedium-v0/{model}/seed{seed}", lines)
    finished = run_main(SCRIPT, "runs", "--out", "out")
    assert finished.code == 0 and finished.err == ""
    summary = table("summary", "model", "phase")
    assert list(summary.index) == list(itertools.product(("hyper", "vanilla"), ("post", "pre")))
    # The baseline, vanilla after adaptation, goes from -8 to -4.
    assert list(summary["mean"]) == pytest.approx([1.5, 1.25, 1, 0])
    assert list(summary.gain_percent) == pytest.approx([50, 25, 0, -100], abs=1e-9)
    probability = summary.probability_of_improvement  # over the baseline, not over itself
    assert list(probability.dropna()) == [1, 1, 0] and np.isnan(probability["vanilla", "post"])
    reached = summary.reached_at_percent.drop(("vanilla", "pre")).astype(float)
    assert list(reached) == pytest.approx([200 / 3, 200 / 3, 100], abs=1e-3)
    assert summary.reached_at_percent["vanilla", "pre"] == "not reached"
    pair = table("train_test", "split", "model")
    assert list(pair.loc[("train", "hyper"), "mean"]) == [-8, -6, -3]
    assert list(pair.loc[("test", "hyper"), "mean"]) == [-8, -4, -2]
    assert list(pair.loc[("test", "hyper"), "step"]) == [150, 300, 450]  # mean of two seeds
    assert Path("out/train_test_maml_hyper_HalfCheetahVelMedium-v0.png").exists()


def test_pictures_show_the_tables_with_units(td3, run_main, monkeypatch):
    figures, savefig = {}, matplotlib.figure.Figure.savefig

    def record(figure, file, **options):
        figures[Path(file).name] = figure
        savefig(figure, file, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", record)
    run_main(SCRIPT, td3, "--out", "out")
    assert set(figures) == {"learning_curves_td3_hyper.png", "summary.png"}
    easy, hard = figures["learning_curves_td3_hyper.png"].axes
    assert hard.get_title() == "Hard-v0, 2 seeds"
    for axis in (easy, hard):
        assert axis.get_xlabel() == "environment steps"
        assert axis.get_ylabel() == "return per episode"
    mlp, sa_hyper = hard.get_lines()
    assert list(mlp.get_ydata()) == [-10, 2, 20] and list(sa_hyper.get_ydata()) == [-10, 20, 50]
    legend = figures["learning_curves_td3_hyper.png"].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["mlp", "sa-hyper"]
    assert [line.get_color() for line in legend.get_lines()] == [mlp._color, sa_hyper._color]
    curves, iqm, probability = figures["summary.png"].axes
    assert "%" in curves.get_xlabel() and curves.get_ylabel() == "mean normalised score"
    assert [text.get_text() for text in iqm.get_yticklabels()] == ["mlp", "sa-hyper"]
    assert [line.get_xdata()[0] for line in iqm.get_lines()[1:4:2]] == pytest.approx([1, 1.25])
    assert probability.get_lines()[3].get_xdata()[0] == pytest.approx(0.6875)


def test_the_eight_critics_have_eight_colours():
    script = runpy.run_path(str(SCRIPT))
    from hypernet import CRITICS

    assert len({script["COLOURS"][critic] for critic in CRITICS}) == 8
    assert len(set(script["colours_of"](["mlp", "hyper", "mlp-oracle", "new"]).values())) == 4


def test_same_tables_twice(td3, run_main):
    run_main(SCRIPT, td3, "--out", "out")
    run_main(SCRIPT, *td3.glob("*/*"), td3 / "td3_hyper/Easy-v0", "--out", "again")
    files = sorted(Path("out").glob("*.[cm]*"))
    assert len(files) == 8
    assert all(file.read_bytes() == Path("again", file.name).read_bytes() for file in files)


RUN = "runs/td3_hyper/Hard-v0/mlp/seed1"
BAD = {
    "no paths": ([], "", "run directories"),
    "no such folder": (["nowhere"], "", "nowhere: no such folder"),
    "no runs": (["empty"], "", "no eval.csv"),
    "unknown option": (["runs", "--in", "x"], "", "--in"),
    "empty file": (["runs"], "", "eval.csv"),
    "header alone": (["runs"], "global_step,episode,return,length\n", "no evaluation"),
    "other columns": (["runs"], "a,b\n1,2\n", "columns"),
    "text": (["runs"], "global_step,episode,return,length\n0,0,x,1\n", "x"),
    "torn": (["runs"], "global_step,episode,return,length\n0,0,1,1\n10,0\n", "missing"),
    "cut": (["runs"], "global_step,episode,return,length\n0,0,1,1\n10,0,5.9", "cut"),
    "ragged": (["runs"], "global_step,episode,return,length\n0,0,1,1\n1,2,3,4,5\n", "line 3"),
    "nan": (["runs"], "global_step,episode,return,length\n0,0,nan,1\n", "not finite"),
    "split": (["runs"], "iteration,env_steps,split,phase,return\n0,0,dev,pre,1\n", "split"),
    "binary": (["runs"], b"\xff\xfe\x00\x81", "eval.csv"),
    "twice": (["runs", "copy"], None, "same run"),
    "place": (["misplaced"], None, "exp_name/env_id/model/seedN"),
    "out": (["runs", "--out", "file"], None, "--out file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_use_is_one_line_and_writes_nothing(td3, run_main, name):
    arguments, content, word = BAD[name]
    if content is not None:
        Path(RUN, "eval.csv").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    Path("empty").mkdir()
    Path("file").touch()
    shutil.copytree("runs", "copy")
    write_td3(Path("misplaced/one"), (1, 2))
    before = sorted(Path(".").rglob("*"))
    finished = run_main(SCRIPT, *arguments, *([] if "--out" in arguments else ["--out", "out"]))
    assert finished.code == 2 and finished.out == ""
    assert finished.err.startswith("error: ") and finished.err.count("\n") == 1, finished.err
    assert word in finished.err
    assert sorted(Path(".").rglob("*")) == before
