"""The run directory: crash-only resume, refusals, errors."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Finished, start

import td3_hyper

SCRIPT = ROOT / "td3_hyper.py"
SMALL = ["--env-id", "InvertedPendulum-v4", "--primary-widths", 8, 16, "--dynamic-width", 8]
SMALL += ["--learning-starts", 100, "--batch-size", 8, "--buffer-size", 700]
SMALL += ["--eval-every", 200, "--eval-episodes", 2]
RUN_DIR = Path("runs/td3_hyper/InvertedPendulum-v4/sa-hyper/seed1")


def small(total_timesteps: int, checkpoint_every: int = 50) -> list:
    return SMALL + ["--total-timesteps", total_timesteps, "--checkpoint-every", checkpoint_every]


def assert_equal(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_run(run_dir: Path, reference: Path, steps: int) -> None:
    assert (run_dir / "eval.csv").read_bytes() == (reference / "eval.csv").read_bytes()
    assert (run_dir / "summary.json").read_bytes() == (reference / "summary.json").read_bytes()
    weights = [torch.load(d / f"step_{steps}.pt", weights_only=True) for d in (run_dir, reference)]
    assert_equal(*weights)


def files(folder: Path) -> dict[Path, tuple[float, bytes]]:
    """Time of change and content of every file but the lock."""
    return {
        file: (file.stat().st_mtime, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def assert_refused(finished: Finished, *words: str, code: int = 2) -> None:
    assert finished.code == code, finished
    lines = [line for line in finished.err.splitlines() if "settotalmass" not in line and line]
    assert len(lines) == 1 and lines[0].startswith("error: "), finished.err
    for word in words:
        assert word in lines[0]


def test_a_run_killed_at_ten_random_moments_ends_like_one_never_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    steps = 3000
    process = start(SCRIPT, *small(steps), cwd=whole)
    out, err = process.communicate()
    assert process.returncode == 0, err

    chance = random.Random(0)
    for moment in ["half", "1", None, "2", None, "3", None, "half", None, None]:
        if moment:  # while a checkpoint is written
            args = (moment, SCRIPT, *small(steps))
            process = start(ROOT / "tests" / "kill_in_checkpoint.py", *args, cwd=killed)
        else:
            process = start(SCRIPT, *small(steps), cwd=killed)
            process.stdout.readline()  # it has begun
            time.sleep(chance.uniform(0, 1))
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert not (killed / RUN_DIR / "summary.json").exists()
    process = start(SCRIPT, *small(steps), cwd=killed)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "resuming" in out and "damaged" not in err
    assert_same_run(killed / RUN_DIR, whole / RUN_DIR, steps)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_end_it_at_once_and_silently(tmp_path, number):
    process = start(SCRIPT, *small(100_000), cwd=tmp_path)
    process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -number and "Traceback" not in err


def test_the_same_command_twice_gives_the_same_run_and_other_seeds_do_not(run_main, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finished = run_main(SCRIPT, *small(400), "--seed", seed, "--runs-dir", name)
        assert finished.code == 0, finished.err
    a, b, c = (next(Path(name).rglob("eval.csv")).parent for name in "abc")
    assert_same_run(a, b, 400)
    assert (a / "eval.csv").read_text() != (c / "eval.csv").read_text()


def test_run_directory_holds_what_the_readme_says(run_main):
    assert run_main(SCRIPT, *small(400), "--save-every", 200).code == 0
    names = {file.name for file in RUN_DIR.iterdir() if "tfevents" not in file.name}
    assert names == {
        ".lock",
        "checkpoint.pt",
        "checkpoint.prev.pt",
        "config.json",
        "eval.csv",
        "step_0.pt",
        "step_200.pt",
        "step_400.pt",
        "summary.json",
    }
    config = json.loads((RUN_DIR / "config.json").read_text())
    assert config["args"]["critic_lr"] == 5e-5 and config["args"]["device"] in ("cpu", "cuda")
    assert config["versions"]["torch"] == torch.__version__
    header, *rows = (RUN_DIR / "eval.csv").read_text().splitlines()
    assert header == "global_step,episode,return,length"
    assert [row.split(",")[:2] for row in rows] == [
        [step, episode] for step in ("0", "200", "400") for episode in ("0", "1")
    ]
    summary = json.loads((RUN_DIR / "summary.json").read_text())
    returns = [float(row.split(",")[2]) for row in rows[-2:]]
    assert summary == {"global_step": 400, "eval_step": 400, "eval_return": sum(returns) / 2}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(RUN_DIR)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "eval/return",
        "eval/length",
        "charts/SPS",
        "charts/episodic_return",
        "charts/episodic_length",
        "losses/critic_loss",
        "losses/actor_loss",
    }
    evaluations = [(e.step, e.value) for e in events.Scalars("eval/return")]
    assert [step for step, _ in evaluations] == [0, 200, 400]
    assert evaluations[-1][1] == pytest.approx(summary["eval_return"], rel=1e-6)


def test_a_complete_run_is_left_alone_and_a_larger_total_extends_it(run_main):
    assert run_main(SCRIPT, *small(650), "--runs-dir", "whole").code == 0
    assert run_main(SCRIPT, *small(400)).code == 0
    before = files(RUN_DIR)
    finished = run_main(SCRIPT, *small(400))
    assert finished.code == 0 and "complete" in finished.out
    assert files(RUN_DIR) == before
    # Arguments that cannot change the result do not count.
    assert run_main(SCRIPT, *small(400, checkpoint_every=77), "--save-every", 200).code == 0
    assert files(RUN_DIR) == before
    finished = run_main(SCRIPT, *small(650))
    assert finished.code == 0 and "resuming" in finished.out
    assert_same_run(RUN_DIR, Path("whole", *RUN_DIR.parts[1:]), 650)
    assert_refused(run_main(SCRIPT, *small(400)), "total_timesteps was 650 and is 400")


def test_other_arguments_are_refused_with_the_fields_that_differ(run_main):
    assert run_main(SCRIPT, *small(200)).code == 0
    before = files(RUN_DIR)
    finished = run_main(SCRIPT, *small(200), "--gamma", 0.9, "--actor-lr", 1e-3)
    assert_refused(finished, "gamma was 0.99 and is 0.9", "actor_lr", "--overwrite")
    assert "critic" not in finished.err.split("other arguments:")[1]
    assert_refused(run_main(SCRIPT, *small(300), "--gamma", 0.9), "gamma was 0.99 and is 0.9")
    assert files(RUN_DIR) == before


def test_overwrite_starts_afresh(run_main):
    assert run_main(SCRIPT, *small(400), "--save-every", 100).code == 0
    assert run_main(SCRIPT, *small(200), "--gamma", 0.9, "--overwrite").code == 0
    assert not (RUN_DIR / "step_400.pt").exists()
    assert run_main(SCRIPT, *small(200), "--gamma", 0.9, "--runs-dir", "fresh").code == 0
    assert_same_run(RUN_DIR, Path("fresh", *RUN_DIR.parts[1:]), 200)


def test_a_second_process_is_refused(tmp_path, run_main):
    process = start(SCRIPT, *small(100_000), cwd=tmp_path)
    process.stdout.readline()
    try:
        for extra in ([], ["--overwrite"]):
            assert_refused(run_main(SCRIPT, *small(100_000), *extra), "another process")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "garbage":
        file.write_bytes(random.Random(0).randbytes(len(content)))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "one flipped bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "garbage", "empty", "one flipped bit"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_main, how):
    assert run_main(SCRIPT, *small(650), "--runs-dir", "whole").code == 0
    assert run_main(SCRIPT, *small(400)).code == 0
    damage(RUN_DIR / "checkpoint.pt", how)
    finished = run_main(SCRIPT, *small(650))
    assert finished.code == 0 and "checkpoint.pt is damaged" in finished.err
    assert "resuming" in finished.out
    assert_same_run(RUN_DIR, Path("whole", *RUN_DIR.parts[1:]), 650)


def test_two_damaged_checkpoints_are_an_error_and_nothing_is_overwritten(run_main):
    assert run_main(SCRIPT, *small(400)).code == 0
    (RUN_DIR / "summary.json").unlink()
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        damage(RUN_DIR / name, "truncated")
    before = files(RUN_DIR)
    finished = run_main(SCRIPT, *small(400))
    assert finished.code == 2 and "no whole checkpoint" in finished.err.splitlines()[-1]
    assert "Traceback" not in finished.err
    after = files(RUN_DIR)
    assert {f: c for f, (_, c) in after.items()} == {f: c for f, (_, c) in before.items()}


def test_other_package_versions_are_said(run_main):
    assert run_main(SCRIPT, *small(200)).code == 0
    config = (RUN_DIR / "config.json").read_text()
    (RUN_DIR / "config.json").write_text(config.replace(torch.__version__, "1.0.0"))
    finished = run_main(SCRIPT, *small(300))
    assert finished.code == 0 and "torch was 1.0.0 and is" in finished.err


def test_no_crash_of_an_overwrite_leaves_a_run_that_looks_complete(run_main, monkeypatch):
    assert run_main(SCRIPT, *small(200)).code == 0
    removed = []

    def unlink(file, **_):
        removed.append(file.name)
        raise SystemExit(9)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert run_main(SCRIPT, *small(200), "--overwrite").code == 9
    assert removed == ["summary.json"]
    order = re.search(r"order = (\{.*?\})", SCRIPT.read_text())[1]
    assert eval(order) == {"summary.json": -1, "config.json": 1}


def test_eval_csv_is_cut_back_to_the_checkpoint(run_main):
    assert run_main(SCRIPT, *small(400)).code == 0
    with open(RUN_DIR / "eval.csv", "a") as stream:
        stream.write("99999,0,1,1\n")
    assert run_main(SCRIPT, *small(500)).code == 0
    assert "99999" not in (RUN_DIR / "eval.csv").read_text()


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"args": [], "versions": {}}', '{"args": {"total_timesteps": null}}'],
)
def test_a_damaged_config_is_an_error(run_main, content):
    assert run_main(SCRIPT, *small(200)).code == 0
    (RUN_DIR / "config.json").write_text(content)
    assert_refused(run_main(SCRIPT, *small(200)), "config.json", "--overwrite")


def test_another_number_of_threads_is_said(run_main):
    assert run_main(SCRIPT, *small(200)).code == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    finished = run_main(SCRIPT, *small(300))
    torch.set_num_threads(threads)
    assert finished.code == 0 and f"threads was {threads} and is" in finished.err


def test_checkpoints_hold_everything_and_load_with_weights_only(run_main):
    assert run_main(SCRIPT, *small(400)).code == 0
    state = torch.load(RUN_DIR / "checkpoint.pt", weights_only=True)
    parts = {"agent", "buffer", "critic_optimizer", "actor_optimizer"}
    assert state.keys() == parts | {"global_step", "eval_csv", "rng"}


PENDULUM = ["--env-id", "InvertedPendulum-v4"]


@pytest.mark.parametrize(
    "args, words",
    [
        (["--env-id", "Hoper-v4"], ["Hoper-v4", "did you mean Hopper-v"]),
        (["--env-id", "Hopper-v2"], ["Hopper-v2", "use Hopper-v4 or Hopper-v5"]),
        (["--env-id", "Hopper-v17"], ["Hopper-v17", "did you mean Hopper-v"]),
        (["--env-id", "no_such_module:Env-v0"], ["no_such_module"]),
        (["--env-id", "CartPole-v1"], ["CartPole-v1", "actions", "Box", "Discrete"]),
        (["--env-id", "toy_envs:Dict-v0"], ["observations must be a flat Box"]),
        (["--env-id", "toy_envs:Image-v0"], ["observations must be a flat Box"]),
        (["--env-id", "toy_envs:Unbounded-v0"], ["bounded"]),
        (["--critic", "sa_hyper"], ["--critic", "'sa_hyper'", "sa-hyper", "resnet35"]),
        (["--bach-size", "3"], ["--bach-size"]),
        (["--batch-size", "many"], ["--batch-size", "many"]),
        (["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
        (["--batch-size", "-5"], ["--batch-size -5", "at least 1"]),
        (["--seed", "-1"], ["--seed -1", "at least 0"]),
        (["--seed", str(2**32)], ["--seed 4294967296", "below 2**32"]),
        (["--actor-lr", "nan"], ["--actor-lr nan"]),
        (["--gamma", "1.5"], ["--gamma 1.5", "[0, 1]"]),
        (["--tau", "-0.1"], ["--tau -0.1", "[0, 1]"]),
        (["--primary-widths", "0"], ["--primary-widths"]),
        (["--learning-starts", "1000000"], ["--learning-starts 1000000", "--total-timesteps"]),
        (["--env-kwargs", "{oops"], ["--env-kwargs {oops", "JSON"]),
        (["--env-kwargs", "[1]"], ["--env-kwargs [1]", "JSON"]),
        (["--env-kwargs", '{"no_such": 1}'], ["no_such"]),
        (["--runs-dir", "/dev/null/runs"], ["--runs-dir /dev/null/runs", "cannot write"]),
    ],
)
def test_bad_use_is_one_line_and_leaves_nothing_behind(run_main, tmp_path, args, words):
    assert_refused(run_main(SCRIPT, *args), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_cuda_device_is_said(run_main, tmp_path):
    assert_refused(run_main(SCRIPT, "--device", "cuda"), "--device cuda", "--device cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kwargs, name",
    [({"nan_reward_at": 33}, "reward"), ({"nan_obs_at": 33}, "observation")],
)
def test_a_non_finite_reward_or_observation_stops_the_run(run_main, tmp_path, kwargs, name):
    args = ["--env-id", "toy_envs:Truncating-v0", "--env-kwargs", json.dumps(kwargs)]
    args += ["--critic", "mlp", "--learning-starts", 10, "--eval-episodes", 1]
    finished = run_main(SCRIPT, *args, "--checkpoint-every", 10)
    assert_refused(finished, f"{name} is not finite at step 33", code=1)
    (file,) = tmp_path.rglob("checkpoint.pt")
    assert torch.load(file, weights_only=True)["global_step"] == 30


def test_a_non_finite_loss_stops_the_run(run_main):
    args = small(400) + ["--critic-lr", 1e30]
    assert_refused(run_main(SCRIPT, *args), "critic_loss is not finite at step 1", code=1)
    state = torch.load(RUN_DIR / "checkpoint.pt", weights_only=True)
    assert all(p.isfinite().all() for p in state["agent"].values())
    assert not (RUN_DIR / "summary.json").exists()


def test_a_full_disk_while_writing_a_checkpoint(tmp_path):
    """A limit on the size of a file stands for the full disk: the write fails half way."""
    process = start(SCRIPT, *small(400), cwd=tmp_path)
    assert process.wait() == 0
    run_dir = tmp_path / RUN_DIR
    checkpoint = (run_dir / "checkpoint.pt").read_bytes()
    limit = len(checkpoint) // 2
    process = start(
        SCRIPT,
        *small(650),
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err
    assert "error: cannot write" in err and "checkpoint" in err and "File too large" in err
    assert (run_dir / "checkpoint.pt").read_bytes() == checkpoint
    assert not list(run_dir.glob("*.tmp"))
    process = start(SCRIPT, *small(650), cwd=tmp_path)  # disk space is back
    out, err = process.communicate()
    assert process.returncode == 0 and "resuming" in out, err


def test_a_full_disk_under_tensorboard_is_one_line_too(run_main, monkeypatch, capfd):
    ends = []
    monkeypatch.setattr(td3_hyper.os, "_exit", ends.append)
    monkeypatch.setattr(threading, "excepthook", td3_hyper.thread_failed)

    def write_events():
        raise OSError(28, "No space left on device")

    thread = threading.Thread(target=write_events)
    thread.start()
    thread.join()
    err = capfd.readouterr().err
    assert ends == [1] and "No space left" in err and len(err.splitlines()) == 1
    assert "threading.excepthook = thread_failed" in SCRIPT.read_text()


def test_help_tells_of_every_option_what_it_does_its_default_and_its_source(run_main):
    finished = run_main(SCRIPT, "--help")
    assert finished.code == 0
    introduction, options = finished.out.replace("│", " ").split(" options ", 1)
    assert "python td3_hyper.py --env-id Hopper-v4 --critic sa-hyper" in introduction
    options = [" ".join(option.split()) for option in re.split(r"\n +--(?=[a-z])", options)[1:]]
    assert [o.split()[0].replace("-", "_") for o in options] == list(vars(td3_hyper.Args()))
    for option in options:
        assert "(default: " in option and len(option) > 50
    algorithm = options[[o.split()[0] for o in options].index("critic") :]
    for option in algorithm:
        assert "(released" in option or "(paper" in option or "(measured" in option, option


def test_track_says_how_to_install_wandb_where_it_is_missing(run_main, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    missing = lambda name, *a: None if name == "wandb" else find_spec(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert_refused(run_main(SCRIPT, "--track"), "pip install wandb")


def test_track_starts_a_run_that_a_resumed_process_continues(run_main, monkeypatch, tmp_path):
    module = tmp_path / "modules" / "wandb.py"
    module.parent.mkdir()
    module.write_text(
        "import json\n"
        "def init(**options):\n"
        "    open('wandb.jsonl', 'a').write(json.dumps(options, default=str) + '\\n')\n"
    )
    monkeypatch.syspath_prepend(module.parent)
    assert run_main(SCRIPT, *small(200), "--track").code == 0
    assert run_main(SCRIPT, *small(400), "--track").code == 0
    first, second = map(json.loads, Path("wandb.jsonl").read_text().splitlines())
    assert first["id"] == second["id"] == "td3_hyper-InvertedPendulum-v4-sa-hyper-seed1"
    assert second["resume"] == "allow" and second["sync_tensorboard"] is True
    assert first["config"]["critic"] == "sa-hyper"


def can_render() -> bool:
    command = ["-c", "import gymnasium as g; e = g.make('Hopper-v4', render_mode='rgb_array')"]
    command[1] += "; e.reset(); e.render()"
    environment = {"MUJOCO_GL": "egl"} | os.environ
    return not subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True
    ).returncode


def test_capture_video_writes_an_mp4_of_each_evaluation_and_changes_no_result(tmp_path):
    if not can_render():
        pytest.skip("no OpenGL here: apt-get install libegl1 libgl1-mesa-dri")
    process = start(SCRIPT, *small(200), "--capture-video", cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    videos = sorted((tmp_path / RUN_DIR / "videos").glob("*.mp4"))
    assert [v.name for v in videos] == ["step_0-episode-0.mp4", "step_200-episode-0.mp4"]
    assert all(b"ftyp" in v.read_bytes()[:12] and v.stat().st_size > 1000 for v in videos)
    shutil.move(tmp_path / RUN_DIR, tmp_path / "filmed")
    process = start(SCRIPT, *small(200), cwd=tmp_path)
    assert process.wait() == 0
    assert_same_run(tmp_path / RUN_DIR, tmp_path / "filmed", 200)
