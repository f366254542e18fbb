"""The run directory, which all scripts share: crash-only resume, refusals, errors. TD3 stands
for the others where they have the same code."""

import errno
import importlib.util
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import MAML, PEARL, ROOT, assert_refused, assert_same_run, files, scalars, small, start

from meta_envs import FAMILIES

SCRIPT, KILLER = ROOT / "td3_hyper.py", ROOT / "tests" / "kill_in_checkpoint.py"
RUN_DIR = Path("runs/td3_hyper/InvertedPendulum-v4/mlp-small/seed1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two complete runs: 400/runs and 650/runs."""
    folder = tmp_path_factory.mktemp("trained")
    for steps in ("400", "650"):
        runs = ["--runs-dir", folder / steps / "runs"]
        assert start(SCRIPT, *small(steps), *runs).wait() == 0
    return folder


@pytest.fixture
def run_of_400(run_main, trained) -> None:
    """The complete run of 400 steps in the working directory."""
    shutil.copytree(trained / "400/runs", "runs")


@pytest.mark.parametrize(
    "name, args, steps, moments",
    [
        ("td3_hyper", small(2000), 2000, [1, None, 2, None, 3, None, None]),
        # Before the 7th rename, which puts the fourth checkpoint in place
        ("sac_hyper", [*small(400), "--precision", "bfloat16"], 400, [7]),
        ("maml_hyper", [*MAML, "--num-iterations", 5, "--checkpoint-every", 1], 5, [7]),
        ("pearl_hyper", [*PEARL, "--buffer-size", 30, "--num-iterations", 5], 5, [7]),
    ],
)
def test_a_killed_run_ends_like_one_never_killed(run_main, name, args, steps, moments):
    script, chance = ROOT / f"{name}.py", random.Random(0)
    assert run_main(script, *args, "--runs-dir", "whole").code == 0
    for moment in moments:
        if moment:  # while a checkpoint is written
            process = start(KILLER, moment, script, *args)
        else:
            process = start(script, *args)
            process.stdout.readline()  # it has begun
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
    finished = run_main(script, *args)
    assert finished.code == 0 and "damaged" not in finished.err, finished
    assert re.search(r" [1-9]\d* of", finished.out)
    (run_dir,) = Path("runs").glob("*/*/*/seed1")
    assert_same_run(run_dir, Path("whole", *run_dir.parts[1:]), steps)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_process_is_refused_and_signals_end_the_first_silently(run_main, number):
    process = start(SCRIPT, *small(100_000))
    process.stdout.readline()
    holder = f"(process {process.pid} on {os.uname().nodename}); if gone, remove runs/"
    assert_refused(run_main(SCRIPT, *small(100_000)), "another process is training", holder)
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -number and "Traceback" not in err


def test_an_interrupt_is_ignored_under_nohup_and_silent_during_the_imports(run_main, tmp_path):
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    process = start(SCRIPT, *small(300), preexec_fn=ignore)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0].endswith("is complete\n") and process.returncode == 0
    slow = "import time; print('importing', flush=True); time.sleep(60)"
    (tmp_path / "filelock.py").write_text(slow)
    process = start(ROOT / "maml_hyper.py", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == -signal.SIGINT


@pytest.mark.parametrize("missing", [errno.ENOSYS, errno.ENOLCK])
def test_on_file_systems_without_flock(run_main, monkeypatch, missing):
    """The lock is then a file that outlives a killed process."""
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(missing, "a stand-in")))
    RUN_DIR.mkdir(parents=True)
    if missing == errno.ENOLCK:
        return assert_refused(run_main(SCRIPT, *small(120)), "cannot write or lock", "a stand-in")
    (RUN_DIR / ".lock").write_text("1234\nanother_node\n")
    refusal = f"(process 1234 on another_node); if gone, remove {RUN_DIR}/.lock"
    assert_refused(run_main(SCRIPT, *small(120)), refusal)
    (RUN_DIR / ".lock").unlink()
    code = "import filelock, os; lock = filelock.SoftFileLock('.lock'); lock.acquire(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], cwd=RUN_DIR, check=True)
    assert (RUN_DIR / ".lock").exists()  # of a process on this host that is gone
    assert run_main(SCRIPT, *small(120)).code == 0


def test_a_run_does_not_need_its_output(run_main):
    command = [sys.executable, SCRIPT, *small(120)]
    line = f"exec {shlex.join(map(str, command))} >&- 2>&-"
    assert subprocess.run(["sh", "-c", line], env=os.environ, capture_output=True).returncode == 0
    assert (RUN_DIR / "summary.json").exists()


def test_help_is_shown_in_any_encoding_and_may_be_cut_off(run_main):
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = start(ROOT / "pearl_hyper.py", "--help", env=ascii_only)
    assert "--gamma" in process.communicate()[0] and process.returncode == 0
    process = start(ROOT / "pearl_hyper.py", "--help")
    process.stdout.close()  # as head does
    assert process.wait() == 1 and process.stderr.read() == "error: [Errno 32] Broken pipe\n"


def test_without_git_or_a_repository_the_commit_is_null(run_main, monkeypatch):
    folder = Path("it's mine").resolve()
    folder.mkdir()
    (folder / "env").symlink_to(shutil.which("env"))
    shutil.copy(SCRIPT, folder)
    monkeypatch.setenv("HOME", str(folder))
    for i, script, path in (1, folder / SCRIPT.name, os.environ["PATH"]), (2, SCRIPT, str(folder)):
        monkeypatch.setenv("PATH", path)
        args = ["--runs-dir", "~/x", "--exp-name", f"/try{i}"]  # in the home folder all the same
        assert run_main(script, *small(120), *args).code == 0
        config = folder / f"x/try{i}" / Path(*RUN_DIR.parts[2:]) / "config.json"
        assert json.loads(config.read_text())["versions"]["git"] is None


def test_run_directory_holds_what_the_readme_says(run_main):
    assert run_main(SCRIPT, *small(450), "--save-every", 200).code == 0
    names = {file.name for file in RUN_DIR.iterdir() if "tfevents" not in file.name}
    expected = ".lock checkpoint.pt checkpoint.prev.pt config.json eval.csv summary.json"
    assert names == {*expected.split(), *(f"step_{n}.pt" for n in (0, 200, 400, 450))}
    config = json.loads((RUN_DIR / "config.json").read_text())
    assert config["args"]["critic_lr"] == 3e-4 and config["threads"] == 1
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", config["versions"]["git"])
    header, *rows = (RUN_DIR / "eval.csv").read_text().splitlines()
    assert header == "global_step,episode,return,length"
    steps = ["0", "200", "400", "450"]  # evaluated at the end, too
    assert [row.split(",")[:2] for row in rows] == [[n, i] for n in steps for i in ("0", "1")]
    summary = json.loads((RUN_DIR / "summary.json").read_text())
    returns = [float(row.split(",")[2]) for row in rows[-2:]]
    assert summary == {"global_step": 450, "eval_return": sum(returns) / 2}
    values = scalars(RUN_DIR)
    assert values.keys() == {
        *("eval/return", "eval/length", "charts/SPS", "charts/episodic_return"),
        *("charts/episodic_length", "losses/critic_loss", "losses/actor_loss", "losses/q_value"),
    }
    assert [step for step, _ in values["losses/actor_loss"]] == [199, 299, 399]
    assert values["eval/return"][-1] == (450, pytest.approx(summary["eval_return"], rel=1e-6))


def test_a_complete_run_is_left_alone_and_a_larger_total_extends_it(run_main, trained, run_of_400):
    before = files(RUN_DIR)
    finished = run_main(SCRIPT, *small(400, checkpoint_every=77), "--save-every", 200)
    assert finished.code == 0 and "complete" in finished.out
    assert files(RUN_DIR) == before
    (events,) = RUN_DIR.glob("events.*")  # of a clock that was ahead
    events.rename(events.with_name("events.out.tfevents.9999999999.host.1.0"))
    assert run_main(SCRIPT, *small(650)).code == 0
    assert_same_run(RUN_DIR, trained / "650" / RUN_DIR, 650)
    assert [file.name for file in RUN_DIR.glob("step_*.pt")] == ["step_650.pt"]
    before = files(RUN_DIR)
    assert_refused(run_main(SCRIPT, *small(400)), "has already reached global_step 650")
    assert files(RUN_DIR) == before


def test_other_arguments_are_refused_with_the_fields_that_differ(run_main, run_of_400):
    before = files(RUN_DIR)
    finished = run_main(SCRIPT, *small(650), "--gamma", 0.9, "--actor-lr", 1e-3)
    assert_refused(finished, "gamma was 0.99 and is 0.9", "actor_lr was", "--exp-name")
    assert "critic" not in finished.err
    assert files(RUN_DIR) == before


@pytest.mark.parametrize("how", ["truncated", "empty", "one flipped bit"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_main, trained, run_of_400, how):
    content = bytearray((RUN_DIR / "checkpoint.pt").read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    damaged = {"truncated": content[:middle], "empty": b"", "one flipped bit": content}[how]
    (RUN_DIR / "checkpoint.pt").write_bytes(damaged)
    finished = run_main(SCRIPT, *small(650))
    assert finished.code == 0 and "checkpoint.pt is damaged" in finished.err
    assert_same_run(RUN_DIR, trained / "650" / RUN_DIR, 650)


def test_without_an_intact_checkpoint_it_refuses_and_changes_nothing(run_main, run_of_400):
    for file in RUN_DIR.glob("checkpoint*.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    before = files(RUN_DIR)
    assert_refused(run_main(SCRIPT, *small(400)), "no intact checkpoint in", "remove the directory")
    assert files(RUN_DIR) == before


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("td3", "--critic sa_hyper", ["--critic", "'sa_hyper'", "sa-hyper", "resnet35"]),
        ("td3", "--bach-size 3", ["--bach-size", "--batch-size"]),
        ("td3", "--seed -1", ["--seed -1: must be from 0 to"]),
        ("td3", "--actor-lr nan", ["--actor-lr nan"]),
        ("td3", "--gamma 1.5", ["--gamma 1.5: must be from 0 to 1"]),
        ("td3", "--learning-starts 1000000", ["must be below --total-timesteps"]),
        ("td3", "--runs-dir /dev/null/runs", ["--runs-dir /dev/null/runs: cannot write"]),
        ("td3", "--device meta", ["--device meta"]),
        ("sac", "--alpha -1", ["--alpha -1.0: must be from 0"]),
        ("maml", "--env-id Hopper-v4", ["--env-id", "Hopper-v4", *FAMILIES]),
        ("maml", "--meta-batch-size 101", ["must not be above --num-train-goals"]),
    ],
)
def test_bad_use_is_explained_and_leaves_nothing(run_main, tmp_path, name, args, words):
    assert_refused(run_main(ROOT / f"{name}_hyper.py", *args.split()), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantity", ["reward", "observation"])
def test_a_non_finite_reward_or_observation_stops_the_run(run_main, tmp_path, quantity):
    args = ["--env-id", "toy_envs:group/Truncating-v0", "--env-kwargs", f"bad_{quantity}_at", 33]
    args += ["--critic", "mlp", "--learning-starts", 10, "--eval-episodes", 1]
    finished = run_main(SCRIPT, *args, "--checkpoint-every", 10)
    assert_refused(finished, f"{quantity} is not finite at global_step 32", code=1)
    (file,) = tmp_path.rglob("checkpoint.pt")
    assert torch.load(file, weights_only=True)["step"] == 30


def test_a_non_finite_loss_stops_the_run(run_main):
    finished = run_main(SCRIPT, *small(400), "--critic-lr", 1e18)
    assert_refused(finished, "critic_loss is not finite at global_step 101", code=1)
    state = torch.load(RUN_DIR / "checkpoint.pt", weights_only=True)
    assert all(p.isfinite().all() for p in state["agent"].values())
    assert not (RUN_DIR / "summary.json").exists()


def test_a_full_disk_while_writing_a_checkpoint(run_main, run_of_400):
    """A limit on the size of a file stands for the full disk: the write fails half way."""
    checkpoint = (RUN_DIR / "checkpoint.pt").read_bytes()
    limit = len(checkpoint) // 2
    limit_files = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    process = start(SCRIPT, *small(650), preexec_fn=limit_files)
    _, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err
    assert "error: cannot write" in err and "checkpoint" in err and "File too large" in err
    assert (RUN_DIR / "checkpoint.pt").read_bytes() == checkpoint
    assert not list(RUN_DIR.glob("*.tmp"))


def test_a_run_has_one_id_for_weights_and_biases_which_writes_nothing_into_its_directory(run_main):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)  # as if it were not installed
        assert_refused(run_main(SCRIPT, "--track"), "pip install wandb")
    if not importlib.util.find_spec("wandb"):
        pytest.skip("needs wandb")
    env = {name: value for name, value in os.environ.items() if name[:5] != "WANDB"}
    for mode, runs in ("online", "other"), ("online", "runs"), ("offline", "runs"):
        env |= {"WANDB_MODE": mode, "WANDB_ERROR_REPORTING": "false", "HOME": str(Path.cwd())}
        args = [*small(120), "--track", "--exp-name", "lr:1e-3", "--runs-dir", runs]
        process = start(SCRIPT, *args, env=env, stdin=subprocess.DEVNULL)
        out, err = process.communicate()
        if mode == "online":
            assert process.returncode == 2 and err.startswith("error: --track: No API key"), err
    assert process.returncode == 0, err
    run_dir, other = (Path(runs, "lr:1e-3", *RUN_DIR.parts[2:]) for runs in ("runs", "other"))
    assert all(file.is_file() and not file.is_symlink() for file in run_dir.iterdir())
    (tracked,) = Path("wandb").glob("offline-run-*")
    assert tracked.name.endswith((run_dir / "wandb_id").read_text())
    assert not tracked.name.endswith((other / "wandb_id").read_text())
