"""Environments: those of the paper with every critic, and those that users bring."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CRITICS, ROOT, assert_refused

import td3_hyper

ENVIRONMENTS = [["Hopper-v4"], ["Hopper-v5"], ["Walker2d-v4"], ["HalfCheetah-v4"]]
ENVIRONMENTS += [["Ant-v4", "ctrl_cost_weight", "0.005"]]
# The method on every environment, and every critic on one of them
PAIRS = [("sa-hyper", env) for env in ENVIRONMENTS] + [*zip(CRITICS[:-1], 2 * ENVIRONMENTS)]
OPTIONS = ["--primary-widths", 8, 16, "--dynamic-width", 8, "--batch-size", 4]
OPTIONS += ["--total-timesteps", 22, "--learning-starts", 20, "--buffer-size", 100]
OPTIONS += ["--eval-every", 22, "--eval-episodes", 1, "--env-kwargs", "max_episode_steps", 10]
SCRIPTS = pytest.mark.parametrize("script", ["td3_hyper.py", "sac_hyper.py"])


@SCRIPTS
@pytest.mark.parametrize("critic, env", PAIRS, ids=[f"{c}-{env[0]}" for c, env in PAIRS])
def test_every_critic_trains_and_the_method_on_every_environment(run_main, script, critic, env):
    finished = run_main(ROOT / script, "--critic", critic, "--env-id", env[0], *OPTIONS, *env[1:])
    assert finished.code == 0, finished.err
    (file,) = Path("runs").rglob("step_22.pt")
    weights = torch.load(file, weights_only=True)
    shutil.rmtree("runs")  # up to 140 MB
    for name in [name for name in weights if name.startswith("critics.")]:
        assert weights[name].isfinite().all()
        moved = not torch.equal(weights[name], weights[f"target_{name}"])
        assert moved or name.endswith("bias"), name


TOY = ["--critic", "mlp", "--total-timesteps", 23, "--learning-starts", 12, "--batch-size", 4]
TOY += ["--eval-every", 10, "--eval-episodes", 1, "--checkpoint-every", 1]


@SCRIPTS
@pytest.mark.parametrize(
    "env, kwargs",
    [
        ("Truncating", []),
        ("Terminating", []),
        ("group/SameArray", []),  # the observations are one array, which it changes in place
        ("Typed", ["obs", "float64", "reward", "int"]),
        ("Typed", ["obs", "int64", "reward", "bool"]),
        ("Typed", ["obs", "uint8", "reward", "array"]),
    ],
)
def test_transitions_are_stored_and_truncation_is_no_termination(run_main, script, env, kwargs):
    options = ["--env-id", f"toy_envs:{env}-v0", *TOY, "--env-kwargs", *kwargs]
    finished = run_main(ROOT / script, *options)
    assert finished.code == 0, finished.err
    # The id, with a module and a namespace, is one level of the run directory
    name = f"toy_envs-{env.replace('/', '-')}-v0"
    run_dir = Path("runs", script.removesuffix(".py"), name, "mlp", "seed1")
    data = torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]["data"]
    obs, action, reward, next_obs, terminated = data.split((2, 2, 1, 2, 1), -1)
    steps, episodes = torch.arange(20) % 5, torch.arange(20) // 5 + 1
    assert (obs == torch.stack([episodes, steps], -1)).all()
    # The real next observation, also at the end of an episode, and never that of the next reset
    assert (next_obs == torch.stack([episodes, steps + 1], -1)).all()
    assert (terminated[:, 0] == ((env in ("Terminating", "Typed")) & (steps == 4))).all()
    assert (action.abs() <= 1).all() and action.abs().max() > 0.5
    expected = 1 + 2.5 + 2.5 * action[:, 0]  # [-1, 1] is [0, 5]
    if "int" in kwargs or "bool" in kwargs:
        expected = (expected.int() if "int" in kwargs else expected > 3).float()
    torch.testing.assert_close(reward[:, 0], expected)
    rows = [row.split(",") for row in (run_dir / "eval.csv").read_text().splitlines()[1:]]
    assert [(row[0], row[3]) for row in rows] == [(str(n), "5") for n in (0, 10, 20, 23)]


# In what follows TD3 stands for SAC, which makes its environment in the same words.
def test_an_environment_without_a_time_limit_gets_a_warning_whose_advice_works(run_main):
    env = ["--env-id", "toy_envs:Endless-v0", *TOY, "--env-kwargs"]
    finished = run_main(ROOT / "td3_hyper.py", *env, "max_episode_steps", "5")
    assert finished.code == 0 and "warning: toy_envs" not in finished.err
    (file,) = Path("runs").rglob("checkpoint.pt")
    assert torch.load(file, weights_only=True)["step"] == 20
    # An environment may also end by itself, so it is only a warning, given once
    env += ["terminate_after", "5", "--runs-dir", "ends_by_itself"]
    finished = run_main(ROOT / "td3_hyper.py", *env)
    hint = "no time limit; if an episode may never end, add --env-kwargs max_episode_steps 1000"
    assert finished.code == 0 and finished.err.count(hint) == 1


def test_actions_never_leave_the_bounds_of_the_environment():
    env = td3_hyper.make_env(td3_hyper.Args(env_id="toy_envs:Bounds-v0", device="cpu"))
    env.reset(seed=1)
    for action in ([-1, -1], [1, 1], [0.3, -0.7]):
        env.step(np.float32(action))  # the environment asserts that its space contains them


@pytest.mark.parametrize(
    "args, words",
    [
        ("Hoper-v4", ["--env-id Hoper-v4", "Did you mean: `Hopper`"]),
        ("Hopper", ["give the version, the newest is Hopper-v5"]),
        ("no_such_module:Env-v0", ["no_such_module"]),
        ("CartPole-v1", ["needs flat observations and flat, bounded actions", "Discrete(2)"]),
        ("toy_envs:Image-v0", ["Box(0, 255, (8, 8, 3)"]),
        ("toy_envs:Unbounded-v0", ["bounded actions: Box(-1.0, 1.0, (2,), float32), Box(-inf"]),
        ("Hopper-v4 --env-kwargs no_such 1", ["--env-kwargs", "no_such"]),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused_in_one_line(run_main, args, words):
    finished = run_main(ROOT / "td3_hyper.py", "--env-id", *args.split())
    assert_refused(finished, *words)
    assert [line[:7] for line in finished.err.splitlines()] == ["error: "]
    assert not Path("runs").exists()
