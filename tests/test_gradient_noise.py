"""analysis/gradient_noise.py (Fig. 5) on small runs of maml_hyper.py."""

import json
from pathlib import Path

import gradient_noise as gn
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, assert_refused, files
from scipy.stats import chi2

import maml_hyper
from meta_envs import MetaVectorEnv, sample_goals

SCRIPT, SPREAD = ROOT / "analysis" / "gradient_noise.py", Path("out/gradient_noise_spread.csv")
FAMILY = Path("runs/maml_hyper/HalfCheetahFwdBack-v0")
SMALL = {"primary_widths": (4, 8), "dynamic_width": 8, "horizon": 8, "episodes_per_goal": 2}
SMALL |= {"num_train_goals": 4, "meta_batch_size": 3, "num_test_goals": 2, "eval_episodes": 2}


def make_run(model: str, *iterations: int, **arguments) -> Path:
    """What maml_hyper.py leaves of a run: config.json and step_N.pt."""
    args = maml_hyper.Args(**SMALL | {"model": model, "device": "cpu"} | arguments)
    run_dir = Path("runs", args.exp_name, args.env_id, model, f"seed{args.seed}")
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps({"args": vars(args)}))
    for iteration in iterations:
        torch.manual_seed(iteration)
        torch.save(maml_hyper.Policy(20, 6, args).state_dict(), run_dir / f"step_{iteration}.pt")
    return run_dir


def test_every_update_starts_from_the_stored_policy_with_episodes_of_its_own(run_main):
    run_dir = make_run("context", *range(5))
    options = ["--out", "out", "--num-checkpoints", 3, "--num-updates", 2]
    assert run_main(SCRIPT, run_dir, *options).code == 0
    table = pd.read_csv("out/gradient_noise.csv")
    assert list(table.iteration) == [0, 0, 2, 2, 4, 4]  # 3 of 5, evenly spread
    assert list(table["update"]) == [0, 1] * 3 and table.post_return.nunique() == 6

    args = maml_hyper.Args(**json.loads((run_dir / "config.json").read_text())["args"])
    rng = np.random.default_rng(1)
    train_goals = sample_goals(args.env_id, 4, rng, "train")
    test_goals = sample_goals(args.env_id, 2, rng, "test")
    policy = maml_hyper.Policy(20, 6, args)
    policy.load_state_dict(torch.load(run_dir / "step_4.pt", weights_only=True))
    rng = np.random.default_rng([1, 4, 2])
    envs = MetaVectorEnv(args.env_id, rng.choice(train_goals, 3, replace=False), 2, 1, 8)
    rollouts, pre, steps = maml_hyper.adapt_and_sample(policy, envs, rng, args)
    meta_batch = maml_hyper.MetaBatch(pre, steps, maml_hyper.make_batch(rollouts[1], args))
    kl = maml_hyper.update(policy, meta_batch, args)["kl"]
    returns = maml_hyper.evaluate(policy, MetaVectorEnv(args.env_id, test_goals, 2, 1, 8), args)
    row = table.iloc[-1]
    assert row.pre_return == pytest.approx(returns["pre"].mean(), rel=1e-5)
    assert row.post_return == pytest.approx(returns["post"].mean(), rel=1e-5)
    assert row.kl == pytest.approx(kl, rel=1e-4) and 0 < row.kl <= 0.01


def test_it_goes_on_where_it_stopped_and_refuses_another_experiments_table(run_main):
    make_run("vanilla", 0, num_adapt_steps=0)
    run_dir = make_run("hyper", 0, 5)
    assert run_main(SCRIPT, FAMILY, "--out", "whole", "--num-updates", 2).code == 0
    assert run_main(SCRIPT, run_dir, "--out", "out", "--num-updates", 1).code == 0
    assert run_main(SCRIPT, FAMILY, "--out", "out", "--num-updates", 2).code == 0
    whole, resumed = (Path(d, "gradient_noise.csv").read_text() for d in ("whole", "out"))
    assert len(whole.splitlines()) == 1 + 3 * 2 and resumed == whole
    other = make_run("vanilla", 0, exp_name="second")
    assert_refused(run_main(SCRIPT, other, "--out", "out"), "another exp_name than second")


def test_the_spread_has_the_interval_of_a_normal_variance(run_main):
    updates = np.arange(50)
    key = dict(zip(gn.KEY, ("HalfCheetahFwdBack-v0", "hyper", 1, 9, updates)))
    rows = key | {"post_return": updates, "kl": 0.01, "exp_name": "e"}
    for factor, phases in ((1, 1), (3, 2)):  # first as without an inner step
        pd.DataFrame(rows | {"pre_return": factor * updates}).to_csv("old.csv", index=False)
        assert run_main(SCRIPT, "old.csv", "--out", "out").code == 0
        assert len(pd.read_csv(SPREAD)) == phases
    assert sorted(files(Path("out"))) == [Path("out/gradient_noise.png"), SPREAD]
    table = pd.read_csv(SPREAD).set_index("phase")
    before = table.loc["before adaptation"]
    assert before.updates == 50 and list(table["mean"]) == [73.5, 24.5]
    expected = 3 * np.std(updates, ddof=1) * np.sqrt([1, *(49 / chi2.ppf([0.975, 0.025], 49))])
    assert [before.spread, before.low, before.high] == pytest.approx(expected, rel=1e-5)


def test_bad_use_ends_with_a_message(run_main):
    assert_refused(run_main(SCRIPT, "nowhere"), "nowhere: no config.json in there")
    run_dir = make_run("vanilla", 0)
    (run_dir / "step_0.pt").write_bytes(b"PK")
    assert_refused(run_main(SCRIPT, run_dir), "step_0.pt does not hold the networks")
