"""maml_hyper.py from the command line. What all scripts share is tested in test_run.py."""

import itertools
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from helpers import MAML, ROOT, assert_refused, scalars

from meta_envs import FAMILIES

SCRIPT = ROOT / "maml_hyper.py"
RUN_DIR = Path("runs/maml_hyper/HalfCheetahFwdBack-v0/hyper/seed1")


def small(num_iterations: int) -> list:
    return [*MAML, "--num-iterations", num_iterations]


@pytest.mark.parametrize("env_id, model", [*zip(FAMILIES, 2 * ["vanilla", "context", "hyper"])])
def test_it_trains_on_every_family(run_main, env_id, model):
    assert run_main(SCRIPT, *small(1), "--env-id", env_id, "--model", model).code == 0
    table = pd.read_csv(Path("runs/maml_hyper", env_id, model, "seed1", "eval.csv"))
    found = {*zip(table.iteration, table.split, table.phase)}
    assert found == {*itertools.product((0, 1), ("train", "test"), ("pre", "post"))}


def test_run_directory_holds_what_the_readme_says(run_main):
    assert run_main(SCRIPT, *small(3), "--eval-every", 2, "--save-every", 2).code == 0
    assert {file.stem for file in RUN_DIR.glob("step_*.pt")} == {"step_0", "step_2", "step_3"}
    table = pd.read_csv(RUN_DIR / "eval.csv")
    assert list(table) == ["iteration", "env_steps", "split", "goal", "phase", "return"]
    # The last iteration is evaluated although it is every second one's turn
    assert list(table.iteration) == [0] * 10 + [2] * 10 + [3] * 10
    assert {*table.goal[table.split == "test"]} == {-1.0, 1.0}
    assert table.env_steps.iloc[-1] == 3 * 2 * 3 * 2 * 8
    last = table.query("iteration == 3 and split == 'test' and phase == 'post'")["return"]
    summary = json.loads((RUN_DIR / "summary.json").read_text())
    assert summary["test_post_return"] == pytest.approx(last.mean()) and summary["iteration"] == 3
    values = scalars(RUN_DIR)
    evaluations = {f"eval/{s}_{p}_return" for s in ("train", "test") for p in ("pre", "post")}
    charts = {"charts/pre_return", "charts/post_return", "charts/SPS"}
    losses = {f"losses/{name}" for name in ("gradient_norm", "surrogate", "kl", "step_size")}
    assert values.keys() == evaluations | charts | losses
    assert [step for step, _ in values["eval/test_post_return"]] == [0, 2, 3]
    assert all(0 <= kl <= 0.01 for _, kl in values["losses/kl"])


def test_an_inner_step_that_explodes_names_the_goal(run_main):
    finished = run_main(SCRIPT, *small(2), "--inner-lr", 1e18)
    assert_refused(finished, "is not finite after 1 inner steps: lower --inner-lr 1e+18", code=1)
    assert re.search(r"the policy of goal -?1 is", finished.err)
    assert not (RUN_DIR / "summary.json").exists() and not (RUN_DIR / "step_0.pt").exists()
