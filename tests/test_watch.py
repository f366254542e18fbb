"""analysis/watch.py plays the networks of a run of each script, and films them."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import imageio.v2 as imageio
import numpy as np
import pandas as pd
import pytest
from helpers import MAML, PEARL, ROOT, assert_refused

import pearl_hyper

SCRIPT = ROOT / "analysis" / "watch.py"
PLAIN = ["--env-id", "Hopper-v4", "--env-kwargs", "max_episode_steps", 12, "--learning-starts", 20]
PLAIN += ["--primary-widths", 4, 8, "--dynamic-width", 4, "--batch-size", 4, "--save-every", 20]
PLAIN += ["--total-timesteps", 40, "--eval-every", 20, "--eval-episodes", 2]
META = ["--env-id", "HalfCheetahVel-v0", "--num-iterations", 1]
OPTIONS = {"maml_hyper": [*MAML, *META, "--inner-lr", 1.0], "pearl_hyper": [*PEARL, *META]}


def train(run_main, script: str, *args) -> Path:
    """The directory of a small run, changed into one on a GPU."""
    finished = run_main(ROOT / f"{script}.py", *OPTIONS.get(script, PLAIN), *args)
    assert finished.code == 0, finished.err
    (config,) = Path("runs", script).rglob("config.json")
    text = config.read_text().replace('"device": "cpu"', '"device": "cuda"')
    config.write_text(text.replace('"cuda_graph": false', '"cuda_graph": true'))
    return config.parent


def returns(finished) -> list[str]:
    """What is printed of each episode."""
    assert finished.code == 0, finished.err
    first, *episodes, mean = finished.out.splitlines()
    texts = [line.split("return ")[1].split(",")[0] for line in episodes]
    assert float(mean.split()[-1]) == pytest.approx(np.mean([*map(float, texts)]), abs=0.011)
    return texts


@pytest.mark.parametrize("script", ["td3_hyper", "sac_hyper"])
def test_td3_and_sac_play_the_episodes_of_their_evaluation(run_main, script):
    run_dir = train(run_main, script)
    steps = pd.read_csv(run_dir / "eval.csv").groupby("global_step")["return"]
    by_step = {step: [f"{value:.2f}" for value in values] for step, values in steps}
    assert by_step[0] != by_step[40]
    for step, expected in by_step.items():
        finished = run_main(SCRIPT, run_dir, "--step", step, "--episodes", 2)
        assert returns(finished) == expected
    finished = run_main(SCRIPT, run_dir)
    assert "step_40.pt" in finished.out and returns(finished)[:2] == by_step[40]


def test_an_environment_without_a_render_mode_is_played_and_closed(run_main):
    env = ["--env-id", "toy_envs:Closing-v0", "--env-kwargs", "terminate_after", 4]
    run_dir = train(run_main, "td3_hyper", *env)
    Path("closed").unlink()
    finished = run_main(SCRIPT, run_dir)
    assert len(returns(finished)) == 3 and "4 steps" in finished.out
    assert Path("closed").exists()
    assert_refused(run_main(SCRIPT, run_dir, "--video", "film.mp4"), "render_mode")


def test_maml_plays_without_adaptation_or_after_it(run_main):
    run_dir = train(run_main, "maml_hyper")
    finished = run_main(SCRIPT, run_dir)
    before = returns(finished)
    table = pd.read_csv(run_dir / "eval.csv", index_col="split")
    assert f"goal {table.goal['test'].iloc[0]:g}\n" in finished.out and "8 steps" in finished.out
    assert returns(run_main(SCRIPT, run_dir, "--adapt")) != before


def test_pearl_plays_with_z_from_the_prior_and_then_from_its_trajectories(run_main, monkeypatch):
    run_dir = train(run_main, "pearl_hyper")
    sample_z = Mock(wraps=pearl_hyper.sample_z)
    monkeypatch.setattr(pearl_hyper, "sample_z", sample_z)
    finished = run_main(SCRIPT, run_dir, "--episodes", 1, "--goal", 0.5)
    assert len(returns(finished)) == 1 and "goal 0.5\n" in finished.out
    prior, posterior = [call.args[1:3] for call in sample_z.call_args_list]
    assert list(prior[0]) == [0.5, 0.5] and prior[1] is None
    assert posterior[1].shape == (1, 16, 20 + 6 + 1)  # two trajectories of 8


def can_render() -> bool:
    code = "import gymnasium as g; g.make('Hopper-v4', render_mode='rgb_array').unwrapped.render()"
    command = [sys.executable, "-c", code]
    environment = {"MUJOCO_GL": "egl"} | os.environ
    return not subprocess.run(command, env=environment, capture_output=True).returncode


def test_a_video_has_every_fifth_step(run_main):
    if not can_render():
        pytest.skip("no OpenGL here: apt-get install libegl1 libgl1-mesa-dri")
    run_dir = train(run_main, "td3_hyper")
    expected = returns(run_main(SCRIPT, run_dir))
    finished = run_main(SCRIPT, run_dir, "--video", "film.mp4")
    assert returns(finished) == expected
    lengths = [int(line.split()[-2]) for line in finished.out.splitlines()[1:-1]]
    frames = imageio.mimread("film.mp4")  # Hopper makes 125 steps a second
    assert len(frames) == sum(-(-length // 5) for length in lengths)
    assert frames[0].shape[:2] == (480, 480) and frames[0].std() > 10
    Path("folder.mp4").mkdir()
    assert_refused(run_main(SCRIPT, run_dir, "--video", "folder.mp4"), "folder.mp4")


def test_bad_use(run_main):
    run_dir = train(run_main, "sac_hyper")
    assert_refused(run_main(SCRIPT, "nowhere"), "nowhere/config.json is missing, or not of a run")
    assert_refused(run_main(SCRIPT, run_dir, "--step", 7), "step_7.pt does not hold", "No such")
    assert_refused(run_main(SCRIPT, run_dir, "--goal", 1), "--goal is for runs of MAML and PEARL")
    assert_refused(run_main(SCRIPT, run_dir, "--adapt"), "--adapt is for runs of MAML")
    assert_refused(run_main(SCRIPT, run_dir, "--video", "film.gif"), "must end with .mp4")
