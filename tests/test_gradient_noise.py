"""analysis/gradient_noise.py on small runs of maml_hyper.py."""

import json
import shutil
import sys
from pathlib import Path

import matplotlib.axes
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from test_run import assert_refused
from test_run_maml import SCRIPT, SMALL

import maml_hyper
from meta_envs import MetaVectorEnv, sample_goals

sys.path.insert(0, str(ROOT / "analysis"))

import gradient_noise  # noqa: E402

NOISE = ROOT / "analysis" / "gradient_noise.py"
FAMILY = Path("runs/maml_hyper/HalfCheetahFwdBack-v0")


def train(run_main, model: str) -> Path:
    args = [*SMALL, "--num-iterations", 6, "--save-every", 1, "--model", model]
    assert run_main(SCRIPT, *args).code == 0
    return FAMILY / model / "seed1"


def test_every_update_starts_from_the_stored_policy_with_episodes_of_its_own(run_main):
    run_dir = train(run_main, "context")
    stored = {file: file.read_bytes() for file in run_dir.glob("step_*.pt")}
    finished = run_main(NOISE, run_dir, "--out", "out", "--num-updates", 3)
    assert finished.code == 0, finished.err
    table = pd.read_csv("out/gradient_noise.csv")
    assert list(table.iteration) == [0] * 3 + [2] * 3 + [4] * 3 + [6] * 3  # 4 of 7, evenly spread
    assert list(table["update"]) == [0, 1, 2] * 4
    assert (table.groupby("iteration").post_return.nunique() == 3).all()
    assert {file: file.read_bytes() for file in run_dir.glob("step_*.pt")} == stored

    # One of them, done by hand and by itself.
    args = maml_hyper.Args(**json.loads((run_dir / "config.json").read_text())["args"])
    rng = np.random.default_rng(1)
    train_goals = sample_goals(args.env_id, 4, rng, "train")
    test_goals = sample_goals(args.env_id, 2, rng, "test")
    policy = maml_hyper.Policy(20, 6, args)
    policy.load_state_dict(torch.load(run_dir / "step_4.pt", weights_only=True))
    rng = np.random.default_rng([1, 4, 2])
    goals = rng.choice(train_goals, 3, replace=False)
    envs = MetaVectorEnv(args.env_id, goals, 2, 1, args.horizon)
    result = maml_hyper.update(policy, maml_hyper.adapt_and_sample(policy, envs, rng, args), args)
    envs = MetaVectorEnv(args.env_id, test_goals, 2, 1, args.horizon)
    returns = maml_hyper.adapt_and_sample(policy, envs, np.random.default_rng(101), args).returns
    row = table[(table.iteration == 4) & (table["update"] == 2)].iloc[0]
    assert row.pre_return == pytest.approx(returns["pre"].mean(), rel=1e-5)
    assert row.post_return == pytest.approx(returns["post"].mean(), rel=1e-5)
    assert row.kl == pytest.approx(result["kl"], rel=1e-4) and 0 < row.kl <= 0.01


def test_it_goes_on_where_it_stopped_and_draws_the_models_side_by_side(run_main):
    for model in ("context", "hyper"):
        train(run_main, model)
    sizes = ["--num-checkpoints", 2]
    assert run_main(NOISE, FAMILY, "--out", "whole", *sizes, "--num-updates", 3).code == 0
    assert run_main(NOISE, FAMILY / "hyper", "--out", "out", *sizes, "--num-updates", 1).code == 0
    assert run_main(NOISE, FAMILY, "--out", "out", *sizes, "--num-updates", 3).code == 0
    whole, resumed = (Path(d, "gradient_noise.csv").read_text() for d in ("whole", "out"))
    assert len(whole.splitlines()) == 1 + 2 * 2 * 3
    assert resumed == whole
    picture = Path("out/gradient_noise_HalfCheetahFwdBack-v0.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    before = Path("out/gradient_noise.csv").stat().st_mtime
    assert run_main(NOISE, FAMILY, "--out", "out", *sizes, "--num-updates", 3).code == 0
    assert Path("out/gradient_noise.csv").stat().st_mtime == before


def test_a_violin_is_of_one_run(monkeypatch, tmp_path):
    drawn = []
    violinplot = matplotlib.axes.Axes.violinplot
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "violinplot",
        lambda axis, values, position, **kwargs: (
            drawn.append((position[0], sorted(values))),
            violinplot(axis, values, position, **kwargs),
        )[1],
    )
    rows = [
        ("hyper", 1, 10.0, 20.0),
        ("hyper", 1, 11.0, 21.0),
        ("hyper", 2, 70.0, 80.0),
        ("hyper", 2, 71.0, 81.0),
        ("context", 2, 1.0, 2.0),
        ("context", 2, 3.0, 4.0),
    ]
    table = pd.DataFrame(rows, columns=["model", "seed", "pre_return", "post_return"])
    table["iteration"] = 0
    gradient_noise.plot("family", table, tmp_path / "a.png")
    before, after = drawn[:3], drawn[3:]
    assert [values for _, values in before] == [[1, 3], [10, 11], [70, 71]]
    assert [values for _, values in after] == [[2, 4], [20, 21], [80, 81]]
    for violins in (before, after):
        places = [place for place, _ in violins]
        assert places == sorted(set(places)) and places[1] == pytest.approx(0)


def test_bad_use_is_one_line(run_main, tmp_path):
    assert_refused(run_main(NOISE), "runs")
    assert_refused(run_main(NOISE, "nowhere"), "nowhere", "no run of maml_hyper.py")
    run_dir = train(run_main, "vanilla")
    assert_refused(run_main(NOISE, run_dir, "--num-updates", 0), "--num-updates 0")
    assert_refused(run_main(NOISE, run_dir, "--out", "/dev/null/x"), "--out /dev/null/x")
    Path("out").mkdir()
    Path("out/gradient_noise.csv").write_text("a,b\n1,2\n")
    assert_refused(run_main(NOISE, run_dir, "--out", "out"), "not a table of this script")
    measured = run_main(
        NOISE, run_dir, "--out", "other", "--num-checkpoints", 1, "--num-updates", 1
    )
    assert measured.code == 0, measured.err
    table = Path("other/gradient_noise.csv").read_text()
    copy = Path("copy")
    shutil.copytree(run_dir, copy)
    assert_refused(run_main(NOISE, run_dir, copy), "vanilla 1", "give one")
    config = json.loads((copy / "config.json").read_text())
    config["args"]["exp_name"] = "second"
    (copy / "config.json").write_text(json.dumps(config))
    assert_refused(run_main(NOISE, copy, "--out", "other"), "another exp_name than second")
    assert Path("other/gradient_noise.csv").read_text() == table
    for file in run_dir.glob("step_*.pt"):
        file.unlink()
    assert_refused(run_main(NOISE, run_dir), "--save-every")
    (run_dir / "config.json").write_text("{}")
    assert_refused(run_main(NOISE, run_dir), "config.json")
