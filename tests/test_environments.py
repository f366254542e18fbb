"""Environments: those of the paper with every critic, and those that users bring."""

import math
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
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
        ("group/Truncating", []),
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
    (file,) = Path("runs").glob(f"*/toy_envs-{env.replace('/', '-')}-v0/mlp/seed1/checkpoint.pt")
    data = torch.load(file, weights_only=True)["buffer"]["data"]
    obs, action, reward, next_obs, terminated = data.split((2, 2, 1, 2, 1), -1)
    steps, episodes = torch.arange(20) % 5, torch.arange(20) // 5 + 1
    assert (obs == torch.stack([episodes, steps], -1)).all()
    # The real next observation, also at the end of an episode, and never that of the next reset
    assert (next_obs == torch.stack([episodes, steps + 1], -1)).all()
    assert (terminated[:, 0] == ((env == "Typed") & (steps == 4))).all()
    assert (action.abs() <= 1).all() and action.abs().max() > 0.5
    expected = 1 + 2.5 + 2.5 * action[:, 0]  # [-1, 1] is [0, 5]
    if "int" in kwargs or "bool" in kwargs:
        expected = (expected.int() if "int" in kwargs else expected > 3).float()
    torch.testing.assert_close(reward[:, 0], expected)


# In what follows TD3 stands for SAC, which makes its environment in the same words.
def test_an_environment_without_a_time_limit_gets_a_warning_whose_advice_works(run_main):
    hint = "no time limit: --env-kwargs max_episode_steps N sets one"
    # An environment may also end by itself, so it is only a warning
    for seed, word, warned in ((1, "terminate_after", True), (2, "max_episode_steps", False)):
        args = ["--env-id", "toy_envs:Clock-v0", *TOY, "--seed", seed, "--env-kwargs", word, 5]
        finished = run_main(ROOT / "td3_hyper.py", *args)
        assert finished.code == 0 and (hint in finished.err) is warned


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_actions_have_the_type_of_the_environment_and_never_leave_its_bounds(dtype):
    # Bounds that rescaled actions would leave by a rounding error
    box = gym.spaces.Box(np.array([-0.2, 0.05], dtype), np.array([1, 0.6], dtype), dtype=dtype)
    args = td3_hyper.Args("mlp", env_id="toy_envs:Spaces-v0", env_kwargs={"action_space": box})
    env = td3_hyper.make_env(args)
    env.reset(seed=1)
    for action, first in ([-1, -1], -0.2), ([1, 1], 1), ([0.3, -0.7], 0.58):
        # The environment asserts that its space contains them
        assert env.step(np.float32(action))[1] == pytest.approx(1 + first, abs=1e-3)


@pytest.mark.parametrize(
    "text, value",
    [
        *(("false", False), ("TRUE", True), ("none", None), ("-5", -5), ("-inf", -math.inf)),
        *(("(0.7, INF)", (0.7, math.inf)), ("[1, None]", (1, None)), ("{'a': 1e-3}", {"a": 1e-3})),
        *(("a/none.xml", "a/none.xml"), ("1j", "1j"), ("", "")),
    ],
)
def test_the_environments_arguments_are_read_as_python_values(text, value):
    read = td3_hyper.read_value(text)
    assert type(read) is type(value) and read == value
    assert td3_hyper.read_value(read) == value  # from config.json, say


def test_the_environment_gets_its_arguments():
    words = "use_contact_forces|false|healthy_z_range|(0.1, inf)|ctrl_cost_weight|0.005".split("|")
    args = tyro.cli(td3_hyper.Args, args=["--env-id", "Ant-v4", "--env-kwargs", *words])
    kwargs = {"use_contact_forces": False, "healthy_z_range": (0.1, math.inf)}
    assert args.env_kwargs == kwargs | {"ctrl_cost_weight": 0.005}
    env = td3_hyper.make_env(args)
    assert env.observation_space.shape == (27,)  # 111 with contact forces
    assert env.unwrapped._healthy_z_range == (0.1, math.inf)


def test_environments_are_closed_at_the_end_and_when_the_script_stops_or_refuses(run_main):
    for code, *args in (
        (0,),
        (2, "--batch-size", 5),  # the run directory holds another run
        (1, "--seed", 2, "--env-kwargs", "bad_reward_at", 15),
    ):
        args = ["--env-id", "toy_envs:Closing-v0", *TOY, *args]
        assert run_main(ROOT / "td3_hyper.py", *args).code == code
        assert Path("closed").read_text() == "xx", args
        Path("closed").unlink()


def test_an_environment_that_draws_from_the_global_generators_repeats(run_main):
    for runs in ("one", "two"):
        args = ["--env-id", "toy_envs:Closing-v0", *TOY, "--runs-dir", runs]
        assert run_main(ROOT / "sac_hyper.py", *args).code == 0
    one, two = (file.read_text() for file in Path().rglob("eval.csv"))
    assert one == two


def test_a_module_in_the_current_folder_is_found(run_main):
    code = "import gymnasium; gymnasium.register('Mine-v0', 'toy_envs:Clock', max_episode_steps=5)"
    Path("my_module.py").write_text(code)
    assert run_main(ROOT / "td3_hyper.py", "--env-id", "my_module:Mine-v0", *TOY).code == 0


@pytest.mark.parametrize(
    "args, words",
    [
        ("Hoper-v4", ["--env-id Hoper-v4", "Did you mean: `Hopper`"]),
        ("Hopper", ["give the version, the newest is Hopper-v5"]),
        ("no_such_module:Env-v0", ["no_such_module"]),
        ("CartPole-v1", ["needs flat Boxes and bounded float actions", "Discrete(2)"]),
        ("toy_envs:Image-v0", ["Box(0, 255, (8, 8, 3)"]),
        ("toy_envs:Unbounded-v0", ["bounded float actions", "Box(-inf, inf, (2,)"]),
        ("toy_envs:Integer-v0", ["bounded float actions", "Box(-3, 3, (2,), int32)"]),
        ("toy_envs:Constant-v0", ["neither equal nor huge: Box([-1. 1.], 1.0, (2,), float32)"]),
        ("toy_envs:Huge-v0", ["neither equal nor huge: Box(-2e+38,"]),
        ("Hopper-v4 --env-kwargs no_such 1", ["--env-kwargs", "no_such", "(TypeError at "]),
        ("toy_envs:Broken-v0", ["'gravity' (KeyError at ", "toy_envs.py:"]),
        ("toy_envs:Typed-v0 --env-kwargs reward vector", ["must be one number, not array(["]),
        ("toy_envs:Typed-v0 --env-kwargs reward text", ["must be one number, not '"]),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused_in_one_line(run_main, args, words):
    finished = run_main(ROOT / "td3_hyper.py", "--env-id", *args.split())
    assert_refused(finished, *words)
    assert [line[:7] for line in finished.err.splitlines()] == ["error: "]
    assert not Path("runs").exists()
