"""analysis/gradient_reliability.py, on a linear-quadratic regulator and on small runs."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_gradient_accuracy as tga
from conftest import ROOT
from test_run import assert_refused

sys.path.insert(0, str(ROOT / "analysis"))

import gradient_reliability  # noqa: E402

SCRIPT = ROOT / "analysis" / "gradient_reliability.py"
TABLE = Path("out/gradient_reliability.csv")
SMALL = ["--num-states", 2, "--out", "out"]


def regulator(noise: float, num_actions: int) -> np.ndarray:
    """Mean of similarities() over 50 states, for a critic that has the exact gradient."""
    rng = np.random.default_rng(0)
    numbers = []
    for s in tga.draw_states(50):
        actions = tga.policy(s) + 0.3 * rng.standard_normal((2 * num_actions, 3))
        returns = np.array([tga.held_q(s, action) for action in actions])
        returns += noise * returns.std() * rng.standard_normal(len(returns))
        of_critic = tga.gradient(s, tga.policy(s))
        numbers.append(gradient_reliability.similarities(actions, returns, of_critic, num_actions))
    return np.mean(numbers, axis=0)


def test_two_estimates_agree_without_noise_and_with_more_rollouts_under_noise():
    assert (regulator(noise=0, num_actions=15) > 0.98).all()
    assert (abs(regulator(noise=1e6, num_actions=15)) < 0.2).all()
    few, many = regulator(noise=3, num_actions=15), regulator(noise=3, num_actions=150)
    assert few[0] < 0.4 and (many > few + 0.2).all()
    assert (few[0] < few[1]) and (many[0] < many[1])  # two noisy ones agree less than one and exact


def test_the_two_share_no_rollout_and_the_first_is_compared_with_the_critic():
    inputs = np.eye(5)[:, :2]
    one, other = inputs @ [1, 2], inputs @ [-2, 1]
    numbers = gradient_reliability.similarities(
        np.tile(inputs, (3, 1)), np.concatenate([one, other, one]), np.array([1, 2]), 5
    )
    assert numbers == pytest.approx((0, 1), abs=1e-12)


def test_a_row_a_state_and_number_of_rollouts_of_the_last_step(run_main):
    for seed in (1, 2):
        run_dir = tga.make_run(Path(f"runs/td3_hyper/Hopper-v4/mlp-small/seed{seed}"), seed=seed)
        (run_dir / "step_7.pt").write_bytes((run_dir / "step_0.pt").read_bytes())
    finished = run_main(SCRIPT, "runs", *SMALL, "--num-actions", 15, 6)
    assert finished.code == 0 and finished.err == "", finished
    table = pd.read_csv(TABLE)
    assert list(table.columns) == gradient_reliability.COLUMNS
    keys = [(seed, 7, i, n) for seed in (1, 2) for i in (0, 1) for n in (6, 15)]
    assert list(table[["seed", "step", "state", "num_actions"]].itertuples(index=False)) == keys
    numbers = table[["similarity_of_two", "cosine_similarity"]]
    assert numbers.abs().max().max() <= 1 and numbers.nunique().min() == 8
    means = table.groupby("num_actions").similarity_of_two.mean()
    printed = [line.split() for line in finished.out.splitlines()[-2:]]
    assert [float(line[-2]) for line in printed] == pytest.approx(means.to_list(), abs=0.006)
    # the same states and, in the first of them, the same rollouts as gradient_accuracy.py's
    assert run_main(tga.SCRIPT, "runs", "--num-states", 2, "--out", "out").code == 0
    other = pd.read_csv(tga.TABLE).query("step == 7 and state == 0").cosine_similarity
    mine = table.query("num_actions == 15 and state == 0").cosine_similarity
    np.testing.assert_allclose(mine, other, rtol=1e-4)


def test_bad_use_is_one_line_and_writes_nothing(run_main):
    assert_refused(run_main(SCRIPT, "nowhere"), "nowhere", "no run of td3_hyper.py")
    tga.make_run(Path("runs/td3_hyper/Hopper-v4/mlp-small/seed1"))
    for option, value in (("--num-states", 0), ("--hold", 0), ("--num-actions", 4)):
        assert_refused(run_main(SCRIPT, "runs", option, value), f"{option} {value}")
    assert_refused(run_main(SCRIPT, "runs", "--out", "/dev/null/x"), "--out /dev/null/x")
    assert not Path("plots").exists()


def test_it_goes_on_where_it_stopped_and_refuses_a_table_of_other_settings(run_main):
    def measure(runs, *options):
        return run_main(SCRIPT, runs, *SMALL, "--num-actions", 6, 15, *options)

    for seed in (1, 2):
        tga.make_run(Path(f"runs/td3_hyper/Hopper-v4/mlp-small/seed{seed}"), seed=seed)
    assert measure("runs").code == 0
    whole = TABLE.read_text()
    TABLE.unlink()
    assert measure("runs/td3_hyper/Hopper-v4/mlp-small/seed2").code == 0
    half = TABLE.read_text()
    assert measure("runs").code == 0
    assert TABLE.read_text() == whole != half
    before = TABLE.stat().st_mtime_ns
    assert measure("runs").code == 0 and TABLE.stat().st_mtime_ns == before
    assert_refused(measure("runs", "--hold", 1), "another hold than 1")
    few = run_main(SCRIPT, "runs", *SMALL, "--num-actions", 15)
    assert_refused(few, "other num_actions than [15]")
    TABLE.write_text("a,b\n1,2\n")
    assert_refused(measure("runs"), "not a table of this script")
