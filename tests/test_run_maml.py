"""maml_hyper.py from the command line: results, resume, errors."""

import csv
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, start
from test_run import assert_equal, assert_refused, assert_same_run, can_render, damage, files

import maml_hyper
from meta_envs import FAMILIES

SCRIPT = ROOT / "maml_hyper.py"
SMALL = ["--primary-widths", 4, 8, "--dynamic-width", 8, "--horizon", 8, "--episodes-per-goal", 2]
SMALL += ["--num-train-goals", 4, "--meta-batch-size", 3, "--num-test-goals", 2]
SMALL += ["--eval-episodes", 2, "--checkpoint-every", 1]
RUN_DIR = Path("runs/maml_hyper/HalfCheetahFwdBack-v0/hyper/seed1")


def small(num_iterations: int) -> list:
    return [*SMALL, "--num-iterations", num_iterations]


def read_rows(run_dir: Path = RUN_DIR) -> list[dict]:
    with open(run_dir / "eval.csv") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("model", ["vanilla", "context", "hyper"])
@pytest.mark.parametrize("env_id", FAMILIES)
def test_every_model_trains_on_every_family(run_main, env_id, model):
    finished = run_main(SCRIPT, *small(1), "--env-id", env_id, "--model", model)
    assert finished.code == 0, finished.err
    run_dir = Path("runs/maml_hyper", env_id, model, "seed1")
    rows = read_rows(run_dir)
    assert {row["iteration"] for row in rows} == {"0", "1"}
    assert {(row["split"], row["phase"]) for row in rows} == {
        (split, phase) for split in ("train", "test") for phase in ("pre", "post")
    }


@pytest.mark.parametrize("num_adapt_steps", [0, 1, 3])
@pytest.mark.parametrize("first_order", [[], ["--first-order"]])
def test_any_number_of_inner_steps(run_main, num_adapt_steps, first_order):
    args = [*small(2), *first_order, "--num-adapt-steps", num_adapt_steps, "--save-every", 1]
    finished = run_main(SCRIPT, *args, "--inner-lr", 0.01)
    assert finished.code == 0, finished.err
    weights = [torch.load(RUN_DIR / f"step_{i}.pt", weights_only=True) for i in range(3)]
    assert all(
        not torch.equal(weights[i]["net.primary.0.weight"], weights[i + 1]["net.primary.0.weight"])
        for i in range(2)
    )
    rows = read_rows()
    phases = {"pre"} if num_adapt_steps == 0 else {"pre", "post"}
    assert {row["phase"] for row in rows} == phases
    # Steps of 3 tasks with 2 episodes of 8 steps, before each inner step and after the last.
    assert rows[-1]["env_steps"] == str(2 * (num_adapt_steps + 1) * 3 * 2 * 8)


def test_run_directory_holds_what_the_readme_says(run_main):
    finished = run_main(SCRIPT, *small(3), "--eval-every", 2, "--save-every", 2)
    assert finished.code == 0, finished.err
    names = {file.name for file in RUN_DIR.iterdir() if "tfevents" not in file.name}
    steps = {"step_0.pt", "step_2.pt", "step_3.pt"}
    files = {".lock", "checkpoint.pt", "checkpoint.prev.pt", "config.json", "eval.csv"}
    assert names == files | steps | {"summary.json"}
    config = json.loads((RUN_DIR / "config.json").read_text())
    assert config["args"]["inner_lr"] == 5e-5 and config["args"]["device"] in ("cpu", "cuda")
    rows = read_rows()
    assert list(rows[0]) == ["iteration", "env_steps", "split", "goal", "phase", "return"]
    assert [row["iteration"] for row in rows] == ["0"] * 10 + ["2"] * 10 + ["3"] * 10
    goals = {(r["goal"]) for r in rows if r["split"] == "test"}
    assert goals == {"-1.0", "1.0"}
    summary = json.loads((RUN_DIR / "summary.json").read_text())
    last = [float(r["return"]) for r in rows[-10:] if (r["split"], r["phase"]) == ("test", "post")]
    assert summary["test_post"] == pytest.approx(sum(last) / 2) and summary["iteration"] == 3
    assert summary["env_steps"] == 3 * 2 * 3 * 2 * 8

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(RUN_DIR)).Reload()
    evaluations = {f"eval/{s}_{p}_return" for s in ("train", "test") for p in ("pre", "post")}
    charts = {"charts/pre_return", "charts/post_return", "charts/env_steps", "charts/SPS"}
    losses = {f"losses/{name}" for name in ("gradient_norm", "surrogate", "kl", "step_size")}
    assert set(events.Tags()["scalars"]) == evaluations | charts | losses
    assert [e.step for e in events.Scalars("eval/test_post_return")] == [0, 2, 3]
    assert all(0 <= e.value <= 0.01 for e in events.Scalars("losses/kl"))


def test_a_run_killed_at_random_moments_ends_like_one_never_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    process = start(SCRIPT, *small(12), cwd=whole)
    _, err = process.communicate()
    assert process.returncode == 0, err
    chance = random.Random(0)
    for moment in ["half", None, "2", None, "3", "1"]:
        if moment:  # while a checkpoint is written
            args = (moment, SCRIPT, *small(12))
            process = start(ROOT / "tests" / "kill_in_checkpoint.py", *args, cwd=killed)
        else:
            process = start(SCRIPT, *small(12), cwd=killed)
            while "starting" not in (line := process.stdout.readline()) and "resuming" not in line:
                assert process.poll() is None
            time.sleep(chance.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(SCRIPT, *small(12), cwd=killed)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "resuming" in out and "damaged" not in err
    assert_same_run(killed / RUN_DIR, whole / RUN_DIR, 12)


def test_a_larger_number_of_iterations_extends_a_run_and_seeds_differ(run_main):
    assert run_main(SCRIPT, *small(4), "--runs-dir", "whole").code == 0
    assert run_main(SCRIPT, *small(2)).code == 0
    before = files(RUN_DIR)
    finished = run_main(SCRIPT, *small(2))
    assert finished.code == 0 and "complete" in finished.out and files(RUN_DIR) == before
    finished = run_main(SCRIPT, *small(4))
    assert finished.code == 0 and "resuming" in finished.out
    assert_same_run(RUN_DIR, Path("whole", *RUN_DIR.parts[1:]), 4)
    assert_refused(run_main(SCRIPT, *small(4), "--gamma", 0.5), "gamma was 0.95 and is 0.5")
    assert run_main(SCRIPT, *small(4), "--seed", 2).code == 0
    other = torch.load(RUN_DIR.with_name("seed2") / "step_4.pt", weights_only=True)
    with pytest.raises(AssertionError):
        assert_equal(other, torch.load(RUN_DIR / "step_4.pt", weights_only=True))


def test_tensorboard_of_a_resumed_run_is_that_of_one_never_stopped(run_main):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for total in (2, 5):
        assert run_main(SCRIPT, *small(total), "--eval-every", 3).code == 0
    events = EventAccumulator(str(RUN_DIR)).Reload()
    assert [e.step for e in events.Scalars("eval/test_post_return")] == [0, 3, 5]
    assert [e.step for e in events.Scalars("losses/kl")] == [0, 1, 2, 3, 4]


def test_how_often_it_evaluates_does_not_change_the_training(run_main):
    assert run_main(SCRIPT, *small(3), "--runs-dir", "often").code == 0
    assert run_main(SCRIPT, *small(3), "--eval-every", 3, "--eval-episodes", 5).code == 0
    often = Path("often", *RUN_DIR.parts[1:])
    assert_equal(*(torch.load(d / "step_3.pt", weights_only=True) for d in (RUN_DIR, often)))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_main):
    assert run_main(SCRIPT, *small(4), "--runs-dir", "whole").code == 0
    assert run_main(SCRIPT, *small(2)).code == 0
    damage(RUN_DIR / "checkpoint.pt", "truncated")
    finished = run_main(SCRIPT, *small(4))
    assert finished.code == 0 and "checkpoint.pt is damaged" in finished.err
    assert_same_run(RUN_DIR, Path("whole", *RUN_DIR.parts[1:]), 4)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--env-id", "HalfCheetahDir-v0"], ["HalfCheetahDir-v0", *FAMILIES]),
        (["--env-id", "Hopper-v4"], ["Hopper-v4", *FAMILIES]),
        (["--model", "mlp"], ["--model", "vanilla", "context", "hyper"]),
        (["--num-train-goals", 0], ["--num-train-goals 0", "at least 1"]),
        (["--num-test-goals", 0], ["--num-test-goals 0", "at least 1"]),
        (["--meta-batch-size", 101], ["--meta-batch-size 101", "--num-train-goals"]),
        (["--episodes-per-goal", 0], ["--episodes-per-goal 0", "at least 1"]),
        (["--horizon", -1], ["--horizon -1", "at least 1"]),
        (["--num-adapt-steps", -1], ["--num-adapt-steps -1", "at least 0"]),
        (["--inner-lr", "nan"], ["--inner-lr nan"]),
        (["--max-kl", 0], ["--max-kl 0", "above 0"]),
        (["--seed", 2**32], ["--seed 4294967296", "below 2**32"]),
        (["--gamma", 1.1], ["--gamma 1.1", "[0, 1]"]),
        (["--gae-lambda", -1], ["--gae-lambda -1", "[0, 1]"]),
        (["--primary-widths", 0], ["--primary-widths"]),
        (["--runs-dir", "/dev/null/runs"], ["--runs-dir /dev/null/runs", "cannot write"]),
    ],
)
def test_bad_use_is_one_line_and_leaves_nothing_behind(run_main, tmp_path, args, words):
    assert_refused(run_main(SCRIPT, *args), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inner_lr", [1e10, 1e30])
def test_an_inner_step_that_explodes_names_the_task(run_main, inner_lr):
    finished = run_main(SCRIPT, *small(2), "--inner-lr", inner_lr)
    assert_refused(finished, "--inner-lr", "is not finite after 1 inner step", code=1)
    assert re.search(r"task \d+ \(goal -?1\)", finished.err)
    assert not (RUN_DIR / "summary.json").exists() and not list(RUN_DIR.glob("*.pt"))


def test_help_tells_of_every_option_what_it_does_its_default_and_its_source(run_main):
    finished = run_main(SCRIPT, "--help")
    assert finished.code == 0
    introduction, options = finished.out.replace("│", " ").split(" options ", 1)
    assert "python maml_hyper.py --env-id HalfCheetahFwdBack-v0 --model hyper" in introduction
    options = [" ".join(option.split()) for option in re.split(r"\n +--(?=[a-z])", options)[1:]]
    assert [o.split()[0].replace("-", "_") for o in options] == list(vars(maml_hyper.Args()))
    for option in options:
        assert "(default: " in option and len(option) > 50
    for option in options[[o.split()[0] for o in options].index("model") :]:
        assert any(source in option for source in ("(released", "(paper", "released code")), option


def test_capture_video_writes_an_mp4_and_changes_no_result(tmp_path):
    if not can_render():
        pytest.skip("no OpenGL here: apt-get install libegl1 libgl1-mesa-dri")
    process = start(SCRIPT, *small(1), "--capture-video", cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    videos = sorted((tmp_path / RUN_DIR / "videos").glob("*.mp4"))
    assert [v.name for v in videos] == [f"iteration_{i}-episode-0.mp4" for i in (0, 1)]
    assert all(b"ftyp" in v.read_bytes()[:12] and v.stat().st_size > 1000 for v in videos)
    shutil.move(tmp_path / RUN_DIR, tmp_path / "filmed")
    subprocess.run(
        [sys.executable, SCRIPT, *map(str, small(1))], cwd=tmp_path, check=True, capture_output=True
    )
    assert_same_run(tmp_path / RUN_DIR, tmp_path / "filmed", 1)
