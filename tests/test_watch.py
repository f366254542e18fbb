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
import torch
from helpers import MAML, PEARL, ROOT, assert_refused, start

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
    assert mean.startswith(f"mean of {len(texts)}: ")
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
    process = start(SCRIPT, run_dir)
    process.stdout.close()  # as head does
    assert process.wait() == 1 and process.stderr.read() == "error: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("model", ["vanilla", "hyper"])
def test_maml_plays_without_adaptation_or_after_it(run_main, model):
    run_dir = train(run_main, "maml_hyper", "--model", model)
    finished = run_main(SCRIPT, run_dir)
    before = returns(finished)
    table = pd.read_csv(run_dir / "eval.csv", index_col="split")
    assert f"goal {table.goal['test'].iloc[0]:g}\n" in finished.out and "8 steps" in finished.out
    assert returns(run_main(SCRIPT, run_dir, "--adapt")) != before
    finished = run_main(SCRIPT, run_dir, "--goal", 2.5)
    assert "goal 2.5\n" in finished.out and returns(finished) != before


@pytest.mark.parametrize("context", ["learned", "oracle"])
def test_pearl_plays_with_the_z_of_its_evaluation(run_main, monkeypatch, context):
    run_dir = train(run_main, "pearl_hyper", "--context", context)
    sample_z = Mock(wraps=pearl_hyper.sample_z)
    monkeypatch.setattr(pearl_hyper, "sample_z", sample_z)
    finished = run_main(SCRIPT, run_dir, "--episodes", 2, "--goal", 0.5)
    assert len(returns(finished)) == 2 and "goal 0.5\n" in finished.out
    contexts = [call.args[2] for call in sample_z.call_args_list]
    if context == "oracle":
        assert contexts == [None, None]
    else:  # two trajectories with z from the prior, then z from their 16 transitions
        shapes = [c if c is None else c.shape for c in contexts]
        assert shapes == [None, None, (1, 16, 20 + 6 + 1)] * 2
        assert not torch.equal(contexts[2], contexts[5])


def can_render() -> bool:
    code = "import gymnasium as g; g.make('Hopper-v4', render_mode='rgb_array').unwrapped.render()"
    command = [sys.executable, "-c", code]
    environment = {"MUJOCO_GL": "egl"} | os.environ
    return not subprocess.run(command, env=environment, capture_output=True).returncode


def test_videos_and_animations(run_main):
    if not can_render():
        pytest.skip("no OpenGL here: apt-get install libegl1 libgl1-mesa-dri")
    run_dir = train(run_main, "td3_hyper")
    expected = returns(run_main(SCRIPT, run_dir))
    finished = run_main(SCRIPT, run_dir, "--video", "film.mp4")
    assert returns(finished) == expected
    lengths = [int(line.split()[-2]) for line in finished.out.splitlines()[1:-1]]
    assert b"ftyp" in Path("film.mp4").read_bytes()[:12]
    frames = imageio.mimread("film.mp4")
    # Hopper makes 125 steps a second, the film shows every fifth
    assert len(frames) == sum(-(-length // 5) for length in lengths)
    assert frames[0].shape == (480, 480, 3) and frames[0].std() > 10
    maml = train(run_main, "maml_hyper")
    assert run_main(SCRIPT, maml, "--video", "maml.gif", "--width", 101).code == 0
    frames = imageio.mimread("maml.gif")
    assert len(frames) == 3 * 8 and frames[0].shape[:2] == (101, 101)


def test_bad_use(run_main, monkeypatch):
    run_dir = train(run_main, "sac_hyper")
    maml = train(run_main, "maml_hyper", "--num-adapt-steps", 0)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for arguments, *words in (
        (["nowhere"], "nowhere/config.json is missing, or not of a run"),
        ([run_dir, "--step", 7], "no step_7.pt, only those of 0, 20, 40"),
        ([run_dir, "--goal", 1.0], "--goal is for runs of MAML and PEARL", "sac_hyper.py"),
        ([run_dir, "--adapt"], "--adapt is for runs of MAML with inner steps"),
        ([maml, "--adapt"], "--adapt is for runs of MAML with inner steps"),
        ([run_dir, "--human"], "--human needs a display"),
        ([run_dir, "--video", "film.avi"], "film.avi: must end with .mp4 or .gif"),
        ([run_dir, "--video", "missing/film.mp4"], "--video missing/film.mp4"),
    ):
        assert_refused(run_main(SCRIPT, *arguments), *words)
    (run_dir / "step_40.pt").write_bytes(b"damaged")
    assert_refused(run_main(SCRIPT, run_dir), "step_40.pt does not hold the networks")
