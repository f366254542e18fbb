"""analysis/plot.py: every number of its tables against one worked out by hand."""

import itertools
import shutil
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, assert_refused, files

SCRIPT = ROOT / "analysis" / "plot.py"
# Mean returns at steps 0, 10 and 20 of seeds 1 and 2.
TD3 = {
    ("Hard-v0", "mlp"): [(-10, 0, 10), (-10, 4, 30)],
    ("Hard-v0", "sa-hyper"): [(-10, 20, 35), (-10, 20, 65)],
    ("Easy-v0", "mlp"): [(0, 50, 100), (0, 70, 300)],
    ("Easy-v0", "sa-hyper"): [(0, 100, 100), (0, 140, 200)],
}
# In Hard-v0 the baseline goes from -10 to 20, in Easy-v0 from 0 to 200.


def write_run(run: Path, lines: list) -> None:
    run.mkdir(parents=True)
    (run / "eval.csv").write_text("".join(f"{line}\n" for line in lines))
    (run / "summary.json").touch()


def write_td3(run: Path, returns) -> None:
    lines = ["global_step,episode,return,length"]
    for i, value in enumerate(returns):
        lines += [f"{10 * i},0,{value - 3},7", f"{10 * i},1,{value + 3},9"]
    write_run(run, lines)


@pytest.fixture
def td3(tmp_path):
    for (env_id, model), seeds in TD3.items():
        for seed, returns in enumerate(seeds, start=1):
            write_td3(tmp_path / f"runs/td3_hyper/{env_id}/{model}/seed{seed}", returns)
    return tmp_path / "runs"


@pytest.fixture
def figures(monkeypatch) -> dict:
    """The pictures that are saved, by name."""
    saved, savefig = {}, matplotlib.figure.Figure.savefig

    def record(figure, file, **options):
        saved[Path(file).name] = figure
        savefig(figure, file, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", record)
    return saved


def table(name: str, *keys: str) -> pd.DataFrame:
    return pd.read_csv(f"out/{name}.csv").set_index(list(keys)).sort_index()


def test_scores_by_hand(td3, run_main):
    finished = run_main(SCRIPT, td3, "--out", "out")
    assert finished.code == 0 and finished.err == ""
    final = table("final_scores", "env_id", "model")
    assert (final.steps == 20).all() and (final.seeds == 2).all()
    hard, easy = final.loc["Hard-v0", "sa-hyper"], final.loc["Easy-v0", "sa-hyper"]
    # The standard error of 35 and 65 is 15; the t-distribution's quantile for 2 seeds is 12.7062.
    assert hard["mean"] == 50
    assert [hard.mean_low, hard.mean_high] == pytest.approx([-140.593, 240.593], abs=1e-3)
    assert [hard.normalised, hard.gain_percent] == pytest.approx([2, 100])
    assert [easy.normalised, easy.gain_percent] == pytest.approx([0.75, -25])
    assert float(hard.reached_at_percent) == 50 and easy.reached_at_percent == "not reached"
    baseline = final.xs("mlp", level="model")
    assert (baseline.normalised == 1).all() and (abs(baseline.gain_percent) < 1e-9).all()
    assert (baseline.reached_at_percent.astype(float) == 100).all()

    summary = table("summary", "model").loc["sa-hyper"]
    values = [summary.environments, summary.normalised, summary.gain_percent]
    assert values == pytest.approx([2, 1.375, 37.5])
    assert "td3_hyper sa-hyper                   2        1.38          37.5" in finished.out


def test_curves_by_hand_and_their_picture(td3, run_main, figures):
    run_main(SCRIPT, td3, "--out", "out")
    curve = table("learning_curves", "env_id", "model").loc[("Hard-v0", "mlp")]
    assert list(curve.step) == [0, 10, 20] and list(curve["mean"]) == [-10, 2, 20]
    low = [-10, 2 - 2 * 12.7062, 20 - 10 * 12.7062]
    assert list(curve.mean_low) == pytest.approx(low, abs=1e-3)
    _, axis = figures["learning_curves.png"].axes
    assert axis.get_title() == "Hard-v0 (2 seeds)"
    mlp, sa_hyper = axis.get_lines()
    assert list(mlp.get_ydata()) == [-10, 2, 20] and list(sa_hyper.get_ydata()) == [-10, 20, 50]
    low_high = axis.collections[1].get_datalim(axis.transData).intervaly
    assert list(low_high) == [-10, 65]  # two seeds: from the one to the other


def test_other_lengths_are_cut_and_only_where_a_baseline_learned_there_are_scores(td3, run_main):
    hard, easy = td3 / "td3_hyper/Hard-v0/mlp/seed1", td3 / "td3_hyper/Easy-v0/sa-hyper/seed2"
    shutil.rmtree(easy)
    shutil.rmtree(hard)
    write_td3(hard, (-10, 40))
    (hard / "summary.json").unlink()
    write_td3(td3 / "td3_hyper/Flat-v0/mlp/seed1", (5, 9, 4))
    write_td3(td3 / "td3_hyper/Flat-v0/sa-hyper/seed1", (5, 9, 9))
    write_td3(td3 / "other/New-v0/sa-hyper/seed1", (5, 9, 9))
    finished = run_main(SCRIPT, td3, "--out", "out")
    for note in (
        "unfinished: td3_hyper/Hard-v0/mlp/seed1, evaluated up to 10",
        "td3_hyper/Hard-v0: only the 2 evaluations that all runs have are used, the last at 10",
        "td3_hyper/Flat-v0: mlp did not learn",
    ):
        assert note in finished.err
    assert "New-v0" not in finished.err
    final = table("final_scores", "env_id", "model")
    assert list(final.loc["Hard-v0"]["mean"]) == [22, 20] and final.steps["Hard-v0", "mlp"] == 10
    one = final.loc["Easy-v0", "sa-hyper"]
    assert one.seeds == 1 and one["mean"] == 100 and np.isnan(one.mean_low)
    scores = final.loc[["Flat-v0", "New-v0"], ["normalised", "gain_percent", "reached_at_percent"]]
    assert scores.isna().all(axis=None) and final["mean"]["New-v0", "sa-hyper"] == 9
    summary = table("summary", "model").loc["sa-hyper"]
    # 30 of the 32 above the first score in Hard-v0 (both runs), half way in Easy-v0 (one run)
    assert summary.normalised == pytest.approx((30 / 32 + 0.5) / 2)


# Mean returns at iterations 0, 1 and 2: test goals before and after adaptation, training goals.
MEDIUM = "HalfCheetahVelMedium-v0"
MAML = {
    "vanilla": {"pre": (-9, -9, -8), "post": (-8, -6, -4), "train": (-8, -5, -3)},
    "hyper": {"pre": (-8, -4, -3), "post": (-8, -4, -2), "train": (-8, -6, -3)},
}


def test_meta_rl_is_scored_on_test_goals_and_the_pair_has_both(tmp_path, run_main, figures):
    for model, seed in itertools.product(MAML, (1, 2)):
        lines = ["iteration,env_steps,split,goal,phase,return"]
        for i, (pre, post, train) in enumerate(zip(*MAML[model].values())):
            rows = (("test", "pre", pre), ("test", "post", post), ("train", "post", train))
            for (split, phase, value), goal in itertools.product(rows, (-1, 1)):
                # An episode may end early: the same iteration, other steps for another seed.
                lines.append(f"{i},{(i + 1) * 100 * seed},{split},{goal},{phase},{value + goal}")
        write_run(tmp_path / f"runs/maml_hyper/{MEDIUM}/{model}/seed{seed}", lines)
    finished = run_main(SCRIPT, "runs", "--out", "out")
    assert finished.code == 0 and finished.err == ""
    # Hyper's post and pre, vanilla's; the baseline, vanilla's post, goes from -8 to -4.
    summary = table("summary", "model", "phase")
    assert list(summary.normalised) == pytest.approx([1.5, 1.25, 1, 0])
    final = table("final_scores", "split", "model", "phase").loc["test"]
    reached = final.reached_at_percent.drop(("vanilla", "pre")).astype(float)
    assert list(reached) == pytest.approx([200 / 3, 200 / 3, 100], abs=1e-3)
    assert final.reached_at_percent["vanilla", "pre"] == "not reached"
    curves = table("learning_curves", "split", "phase", "model")
    assert list(curves.loc[("train", "post", "hyper"), "mean"]) == [-8, -6, -3]
    assert list(curves.loc[("test", "post", "hyper"), "mean"]) == [-8, -4, -2]
    assert list(curves.loc[("test", "pre", "hyper"), "step"]) == [150, 300, 450]  # of two seeds
    before, after = figures["learning_curves.png"].axes
    assert before.get_title() == f"{MEDIUM} pre (2 seeds)"
    assert list(after.get_lines()[1].get_ydata()) == [-8, -4, -2]
    train, test = figures[f"train_test_{MEDIUM}.png"].axes
    assert list(train.get_lines()[1].get_ydata()) == [-8, -6, -3]
    assert list(test.get_lines()[1].get_ydata()) == [-8, -4, -2]
    assert train.get_title() == f"{MEDIUM} train (2 seeds)"


@pytest.mark.parametrize("name", ["td3", "maml", "pearl"])
def test_the_committed_tables_are_redrawn_byte_for_byte(name, run_main):
    results = ROOT / "results"
    assert run_main(SCRIPT, results / "evaluations" / f"{name}_hyper", "--out", "out").code == 0
    for file in ("learning_curves.csv", "final_scores.csv", "summary.csv"):
        assert Path("out", file).read_bytes() == (results / name / file).read_bytes()


BAD = [
    ("nowhere", None, "nowhere: no eval.csv"),
    ("runs", "a,b\n1,2\n", "columns"),
    ("runs", "global_step,episode,return,length\n", "has been evaluated yet"),
    ("runs copy", None, "same run"),
    ("misplaced", None, "exp_name/env_id/model/seedN"),
]


def test_bad_use_ends_with_a_message_and_writes_nothing(run_main):
    for run in ("runs/td3/E-v0/mlp/seed1", "copy/td3/E-v0/mlp/seed1", "misplaced/one"):
        write_td3(Path(run), (1, 2))
    before = files(Path())
    for arguments, content, word in BAD:
        table = Path("runs/td3/E-v0/mlp/seed1/eval.csv")
        whole = table.read_text()
        table.write_text(content or whole)
        assert_refused(run_main(SCRIPT, *arguments.split()), word)
        table.write_text(whole)
        assert files(Path()) == before
