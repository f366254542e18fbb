"""analysis/watch.py plays the networks of a run of each script, and films them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import assert_refused

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "analysis" / "watch.py"
sys.path.append(str(ROOT / "analysis"))

import watch  # noqa: E402

NETWORKS = ["--primary-widths", 4, 8, "--dynamic-width", 4]
PLAIN = ["--env-id", "Hopper-v4", "--env-kwargs", "max_episode_steps", 12, *NETWORKS]
PLAIN += ["--learning-starts", 20, "--batch-size", 4, "--eval-every", 20, "--eval-episodes", 2]
PLAIN += ["--total-timesteps", 40, "--save-every", 20]
META = [*NETWORKS, "--env-id", "HalfCheetahVel-v0", "--num-train-goals", 2, "--num-test-goals", 2]
META += ["--num-iterations", 1, "--horizon", 7, "--meta-batch-size", 2]
MAML = [*META, "--episodes-per-goal", 2, "--eval-episodes", 2, "--inner-lr", 1.0]
PEARL = [*META, "--num-initial-steps", 7, "--num-prior-steps", 7, "--num-posterior-steps", 7]
PEARL += ["--num-train-steps", 1, "--batch-size", 4, "--context-batch-size", 4]


def train(run_main, script: str, *args) -> Path:
    """The directory of a small run, changed into one on a GPU."""
    small = {"maml_hyper": MAML, "pearl_hyper": PEARL}.get(script, PLAIN)
    finished = run_main(ROOT / f"{script}.py", *small, *args)
    assert finished.code == 0, finished.err
    (config,) = Path("runs", script).rglob("config.json")
    text = config.read_text().replace('"device": "cpu"', '"device": "cuda"')
    config.write_text(text.replace('"cuda_graph": false', '"cuda_graph": true'))
    return config.parent


def evaluations(run_dir: Path) -> list[dict]:
    with open(run_dir / "eval.csv") as stream:
        return list(csv.DictReader(stream))


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
    by_step = {}
    for row in evaluations(run_dir):
        by_step.setdefault(row["global_step"], []).append(f"{float(row['return']):.2f}")
    assert by_step["0"] != by_step["40"]
    for step, expected in by_step.items():
        finished = run_main(SCRIPT, run_dir, "--step", step, "--episodes", 2)
        assert returns(finished) == expected
    finished = run_main(SCRIPT, run_dir)
    assert "step_40.pt" in finished.out and returns(finished)[:2] == by_step["40"]


@pytest.mark.parametrize("model", ["vanilla", "hyper"])
def test_maml_plays_without_adaptation_or_after_it(run_main, model):
    run_dir = train(run_main, "maml_hyper", "--model", model)
    finished = run_main(SCRIPT, run_dir)
    before = returns(finished)
    test_goals = [float(row["goal"]) for row in evaluations(run_dir) if row["split"] == "test"]
    assert f"goal {test_goals[0]:g}\n" in finished.out and "7 steps" in finished.out
    assert returns(run_main(SCRIPT, run_dir, "--adapt")) != before
    finished = run_main(SCRIPT, run_dir, "--goal", 2.5)
    assert "goal 2.5\n" in finished.out and returns(finished) != before


@pytest.mark.parametrize("context", ["learned", "oracle"])
def test_pearl_plays_with_the_z_of_its_evaluation(run_main, monkeypatch, context):
    run_dir = train(run_main, "pearl_hyper", "--context", context)
    contexts, sample_z = [], watch.pearl_hyper.sample_z

    def spy(agent, goals, context, rng, args):
        contexts.append(context)
        return sample_z(agent, goals, context, rng, args)

    monkeypatch.setattr(watch.pearl_hyper, "sample_z", spy)
    finished = run_main(SCRIPT, run_dir, "--episodes", 2, "--goal", 0.5)
    assert len(returns(finished)) == 2 and "goal 0.5\n" in finished.out
    if context == "oracle":
        assert contexts == [None, None]
    else:  # two trajectories with z from the prior, then z from their 14 transitions
        shapes = [c if c is None else c.shape for c in contexts]
        assert shapes == [None, None, (1, 14, 20 + 6 + 1)] * 2
        assert not torch.equal(contexts[2], contexts[5])


def can_render() -> bool:
    code = "import gymnasium as g; e = g.make('Hopper-v4', render_mode='rgb_array'); e.reset()"
    command = [sys.executable, "-c", code + "; e.render()"]
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
    assert len(frames) == 3 * 7 and frames[0].shape[:2] == (101, 101)


def test_bad_use(run_main, monkeypatch):
    run_dir = train(run_main, "sac_hyper")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for arguments, *words in (
        (["nowhere"], "nowhere/config.json does not hold the arguments of a run"),
        ([run_dir, "--step", 7], "no step_7.pt, only those of 0, 20, 40"),
        ([run_dir, "--goal", 1.0], "--goal is for runs of MAML and PEARL", "sac_hyper.py"),
        ([run_dir, "--adapt"], "--adapt is for runs of MAML with inner steps"),
        ([run_dir, "--human"], "--human needs a display"),
        ([run_dir, "--video", "film.avi"], "film.avi: must end with .mp4 or .gif"),
        ([run_dir, "--video", "missing/film.mp4"], "--video missing/film.mp4"),
    ):
        assert_refused(run_main(SCRIPT, *arguments), *words)
    (run_dir / "step_40.pt").write_bytes(b"damaged")
    assert_refused(run_main(SCRIPT, run_dir), "step_40.pt does not hold the networks")
    maml = train(run_main, "maml_hyper", "--num-adapt-steps", 0)
    assert_refused(
        run_main(SCRIPT, maml, "--adapt"), "--adapt is for runs of MAML with inner steps"
    )
