"""Environments: those of the paper with every critic, and those that users bring."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused

import td3_hyper
from hypernet import CRITICS

ANT = ["Ant-v4", "--env-kwargs", "ctrl_cost_weight", "0.005"]
ENVIRONMENTS = [["Hopper-v4"], ["Hopper-v5"], ["Walker2d-v4"], ["HalfCheetah-v4"], ANT]
# mlp-large and resnet35 have one size, the others are made small.
OPTIONS = ["--primary-widths", 8, 16, "--dynamic-width", 8, "--batch-size", 4]
OPTIONS += ["--total-timesteps", 26, "--learning-starts", 20, "--buffer-size", 100]
OPTIONS += ["--eval-every", 26, "--eval-episodes", 1]
SCRIPTS = pytest.mark.parametrize("script", ["td3_hyper.py", "sac_hyper.py"])


@SCRIPTS
@pytest.mark.parametrize("env", ENVIRONMENTS, ids=lambda env: env[0])
@pytest.mark.parametrize("critic", CRITICS)
def test_every_critic_trains_on_every_environment(run_main, script, env, critic):
    finished = run_main(ROOT / script, "--env-id", *env, "--critic", critic, *OPTIONS)
    assert finished.code == 0, finished.err
    (file,) = Path("runs").rglob("step_26.pt")
    assert (file.parent / "summary.json").exists()
    assert len((file.parent / "eval.csv").read_text().splitlines()) == 3
    weights = torch.load(file, weights_only=True)
    shutil.rmtree("runs")  # up to 140 MB
    for name in [name for name in weights if name.startswith("critics.")]:
        online, target = weights[name], weights[f"target_{name}"]
        assert online.isfinite().all()
        if name.endswith("weight") and online.numel() > 1:
            assert not torch.equal(online, target), name  # an update moved it


TOY = ["--critic", "mlp", "--total-timesteps", 23, "--learning-starts", 12, "--batch-size", 4]
TOY += ["--eval-every", 10, "--eval-episodes", 1, "--checkpoint-every", 1]


def stored(script: str, run_main, *args: object) -> tuple[Path, int, list[torch.Tensor]]:
    """Trains on a toy: its run directory, its checkpoint's step and the stored transitions."""
    finished = run_main(ROOT / script, *args, *TOY)
    assert finished.code == 0, finished.err
    (file,) = Path("runs").rglob("checkpoint.pt")
    state = torch.load(file, weights_only=True)
    return file.parent, state["step"], state["buffer"]["data"].split((2, 2, 1, 2, 1), -1)


def assert_clock(transitions: list[torch.Tensor], terminates: bool) -> None:
    """The observations are (episode, step), the next ones those of the step after."""
    obs, action, reward, next_obs, terminated = transitions
    steps, episodes = torch.arange(20) % 5, torch.arange(20) // 5 + 1
    assert (obs == torch.stack([episodes, steps], -1)).all()
    # The real next observation, also at the end of an episode, and never that of the next reset
    assert (next_obs == torch.stack([episodes, steps + 1], -1)).all()
    assert (terminated[:, 0] == (terminates & (steps == 4))).all()
    assert (action.abs() <= 1).all() and action.abs().max() > 0.5


@SCRIPTS
@pytest.mark.parametrize("env, terminates", [("Truncating", False), ("Terminating", True)])
def test_termination_is_stored_and_truncation_is_not(run_main, script, env, terminates):
    run_dir, step, transitions = stored(script, run_main, "--env-id", f"toy_envs:{env}-v0")
    assert step == 20
    assert_clock(transitions, terminates)
    _, action, reward, _, _ = transitions
    torch.testing.assert_close(reward[:, 0], 1 + 2.5 + 2.5 * action[:, 0])  # [-1, 1] is [0, 5]
    with open(run_dir / "eval.csv") as stream:
        rows = [(row["global_step"], row["length"]) for row in csv.DictReader(stream)]
    assert rows == [("0", "5"), ("10", "5"), ("20", "5"), ("23", "5")]


@SCRIPTS
def test_observations_that_are_one_array_changed_in_place_are_stored_right(run_main, script):
    """And the id, with a module and a namespace, is one level of the run directory."""
    run_dir, step, transitions = stored(script, run_main, "--env-id", "toy_envs:group/SameArray-v0")
    assert_clock(transitions, terminates=False)
    name = script.removesuffix(".py")
    assert run_dir == Path("runs", name, "toy_envs-group-SameArray-v0", "mlp", "seed1")


@SCRIPTS
@pytest.mark.parametrize(
    "types",
    [("float32", "float32"), ("float64", "int"), ("int64", "bool"), ("uint8", "array")],
    ids=" obs, ".join,
)
def test_observations_rewards_and_flags_of_other_types(run_main, script, types):
    kwargs = ["--env-kwargs", "obs", types[0], "reward", types[1]]
    _, _, transitions = stored(script, run_main, "--env-id", "toy_envs:Typed-v0", *kwargs)
    assert_clock(transitions, terminates=True)
    expected = 1 + 2.5 + 2.5 * transitions[1][:, 0]
    if types[1] in ("int", "bool"):
        expected = expected.int().float() if types[1] == "int" else (expected > 3).float()
    torch.testing.assert_close(transitions[2][:, 0], expected)


def test_actions_never_leave_the_bounds_of_the_environment():
    args = td3_hyper.Args(env_id="toy_envs:Bounds-v0", device="cpu")
    env = td3_hyper.make_env(args)
    env.reset(seed=1)
    for action in ([-1, -1], [1, 1], [0.3, -0.7]):
        env.step(np.float32(action))  # the environment asserts that its space contains them


@SCRIPTS
def test_an_environment_without_a_time_limit_gets_a_warning_whose_advice_works(run_main, script):
    env = ["--env-id", "toy_envs:Endless-v0"]
    finished = run_main(ROOT / script, *env, *TOY, "--env-kwargs", "max_episode_steps", "5")
    assert finished.code == 0 and "warning: toy_envs" not in finished.err
    (file,) = Path("runs").rglob("checkpoint.pt")
    assert torch.load(file, weights_only=True)["step"] == 20
    assert file.with_name("summary.json").exists()
    # An environment may also end by itself, so it is only a warning, given once
    env += ["--env-kwargs", "terminate_after", "5", "--runs-dir", "ends_by_itself"]
    finished = run_main(ROOT / script, *env, *TOY)
    assert finished.code == 0
    hint = "no time limit; if an episode may never end, add --env-kwargs max_episode_steps 1000"
    assert finished.err.count(hint) == 1


@SCRIPTS
@pytest.mark.parametrize(
    "args, words",
    [
        (["Hoper-v4"], ["--env-id Hoper-v4", "Did you mean: `Hopper`"]),
        (["Hopper-v17"], ["--env-id Hopper-v17", "`v5`"]),
        (["no_such_module:Env-v0"], ["no_such_module"]),
        (["CartPole-v1"], ["must be flat Boxes, not Discrete(2)"]),
        (["toy_envs:Dict-v0"], ["must be flat Boxes, not Dict"]),
        (["toy_envs:Image-v0"], ["must be flat Boxes, not Box(0, 255, (8, 8, 3)"]),
        (["toy_envs:Unbounded-v0"], ["actions must be bounded, not Box(-inf"]),
        (["Hopper-v4", "--env-kwargs", "no_such", "1"], ["--env-kwargs", "no_such"]),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused_in_one_line(run_main, script, args, words):
    finished = run_main(ROOT / script, "--env-id", *args)
    assert_refused(finished, *words)
    assert [line[:7] for line in finished.err.splitlines()] == ["error: "]
    assert not Path("runs").exists()
