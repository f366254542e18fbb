"""maml_hyper.py and pearl_hyper.py as commands; test_run.py has what all scripts share."""

import itertools
import json
from pathlib import Path

import pandas as pd
import pytest
from helpers import MAML, PEARL, ROOT, assert_refused, scalars

from meta_envs import FAMILIES

OPTIONS = {"maml": MAML, "pearl": [*PEARL, "--num-posterior-steps", 12]}
MODELS = {"maml": 2 * ["vanilla", "context", "hyper"], "pearl": 3 * ["hyper", "mlp"]}
RUNS = [(name, *run) for name, models in MODELS.items() for run in zip(FAMILIES, models)]


def run(run_main, name: str, num_iterations: int, *args):
    options = [*OPTIONS[name], "--num-iterations", num_iterations, *args]
    return run_main(ROOT / f"{name}_hyper.py", *options)


@pytest.mark.parametrize("name, env_id, model", RUNS)
def test_they_train_on_every_family_with_goals_of_its_split(run_main, name, env_id, model):
    assert run(run_main, name, 1, "--env-id", env_id, "--model", model).code == 0
    table = pd.read_csv(Path("runs", f"{name}_hyper", env_id, model, "seed1", "eval.csv"))
    found = {*zip(table.iteration, table.split, table.phase)}
    assert found == {*itertools.product((0, 1), ("train", "test"), ("pre", "post"))}
    for split, goals in table.groupby("split").goal:
        assert goals.between(*getattr(FAMILIES[env_id], split)).all()


@pytest.mark.parametrize(
    "name, model, args, phases, env_steps, loss",
    [
        ("maml", "hyper", [], ["pre", "post"], [0, 192, 288], "surrogate"),
        # 4 tasks of 16 steps once; then 2 tasks of 8 and 12 steps, the latter in trajectories of 8
        ("pearl", "mlp-oracle", ["--context", "oracle"], ["post"], [0, 160, 208], "q_loss"),
    ],
)
def test_run_directory_is_as_in_the_readme(run_main, name, model, args, phases, env_steps, loss):
    args = ["--model", model.split("-")[0], "--eval-every", 2, "--save-every", 2, *args]
    assert run(run_main, name, 3, *args).code == 0
    (run_dir,) = Path("runs", f"{name}_hyper").glob(f"*/{model}/seed1")
    assert {file.stem for file in run_dir.glob("step_*.pt")} == {"step_0", "step_2", "step_3"}
    table = pd.read_csv(run_dir / "eval.csv")
    assert list(table) == ["iteration", "env_steps", "split", "goal", "phase", "return"]
    # The last iteration is evaluated although it is every second one's turn
    groups = table.groupby(["iteration", "env_steps"])
    assert [*groups.groups] == [*zip((0, 2, 3), env_steps)]
    for _, group in groups:
        train_goals = 3 if name == "maml" else 2
        kinds = [[phase, s] for phase in phases for s in train_goals * ["train"] + 2 * ["test"]]
        assert sorted(group[["phase", "split"]].values.tolist()) == sorted(kinds)
    last = table.query("iteration == 3 and split == 'test' and phase == 'post'")["return"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["test_post_return"] == pytest.approx(last.mean())
    assert (summary["iteration"], summary["env_steps"]) == (3, env_steps[-1])
    values = scalars(run_dir)
    assert [i for i, _ in values["eval/test_post_return"]] == [0, 2, 3]
    assert [i for i, _ in values[f"losses/{loss}"]] == [0, 1, 2]


def test_an_inner_step_that_explodes_names_the_goal(run_main):
    finished = run(run_main, "maml", 2, "--inner-lr", 1e18)
    assert_refused(finished, "is not finite: lower --inner-lr 1e+18", code=1)
    assert not [*Path("runs").rglob("summary.json")]
