"""The run directory, which all scripts share: crash-only resume, refusals, errors. TD3 stands
for the others where they have the same code."""

import json
import random
import re
import resource
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
        ("td3_hyper", small(2000), 2000, ["half", 1, None, 2, None, 3, None, "half", None, None]),
        # Before the 8th rename, which puts the fourth checkpoint in place
        ("sac_hyper", small(400), 400, [8]),
        ("maml_hyper", [*MAML, "--num-iterations", 5, "--checkpoint-every", 1], 5, [8]),
        ("pearl_hyper", [*PEARL, "--buffer-size", 30, "--num-iterations", 5], 5, [8]),
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
    time.sleep(1)  # TensorBoard tells files apart by the second in which they were begun
    finished = run_main(script, *args)
    assert finished.code == 0 and "damaged" not in finished.err, finished
    assert re.search(r" [1-9]\d* of", finished.out)
    (run_dir,) = Path("runs").glob("*/*/*/seed1")
    assert_same_run(run_dir, Path("whole", *run_dir.parts[1:]), steps)
    assert_refused(run_main(script, *args, "--gamma", 0.5), "gamma was 0.9", "and is 0.5")


def test_a_bfloat16_run_resumes_bit_for_bit_and_keeps_its_precision(run_main, trained):
    args = [*small(400), "--precision", "bfloat16"]
    assert run_main(SCRIPT, *args, "--runs-dir", "whole").code == 0
    assert run_main(SCRIPT, *small(250), "--precision", "bfloat16").code == 0
    assert_refused(run_main(SCRIPT, *small(400)), "precision was bfloat16 and is float32")
    assert run_main(SCRIPT, *args).code == 0
    assert_same_run(RUN_DIR, Path("whole", *RUN_DIR.parts[1:]), 400)
    folders = RUN_DIR, trained / "400" / RUN_DIR
    ours, float32 = (torch.load(d / "step_400.pt", weights_only=True) for d in folders)
    assert not torch.equal(ours["actor.output.weight"], float32["actor.output.weight"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_process_is_refused_and_signals_end_the_first_silently(run_main, number):
    process = start(SCRIPT, *small(100_000))
    process.stdout.readline()
    assert_refused(run_main(SCRIPT, *small(100_000)), "another process is training in runs/")
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -number and "Traceback" not in err


def test_run_directory_holds_what_the_readme_says(run_main):
    finished = run_main(SCRIPT, *small(450), "--save-every", 200)  # evaluated at the end, too
    assert finished.code == 0 and len(re.findall(r"global_step \d+: return", finished.out)) == 4
    names = {file.name for file in RUN_DIR.iterdir() if "tfevents" not in file.name}
    expected = ".lock checkpoint.pt checkpoint.prev.pt config.json eval.csv summary.json"
    assert names == {*expected.split(), *(f"step_{n}.pt" for n in (0, 200, 400, 450))}
    config = json.loads((RUN_DIR / "config.json").read_text())
    assert config["args"]["critic_lr"] == 3e-4
    assert config["versions"]["torch"] == torch.__version__ and config["threads"] == 1
    header, *rows = (RUN_DIR / "eval.csv").read_text().splitlines()
    assert header == "global_step,episode,return,length"
    steps = [step for step in ("0", "200", "400", "450") for _ in range(2)]
    assert [row.split(",")[:2] for row in rows] == [[n, str(i % 2)] for i, n in enumerate(steps)]
    summary = json.loads((RUN_DIR / "summary.json").read_text())
    returns = [float(row.split(",")[2]) for row in rows[-2:]]
    assert summary == {"global_step": 450, "eval_return": sum(returns) / 2}
    values = scalars(RUN_DIR)
    assert values.keys() == {
        *("eval/return", "eval/length", "charts/SPS", "charts/episodic_return"),
        *("charts/episodic_length", "losses/critic_loss", "losses/actor_loss", "losses/q_value"),
    }
    for name in ("critic_loss", "actor_loss", "q_value"):  # every 100 updates
        assert [step for step, _ in values[f"losses/{name}"]] == [199, 299, 399]
    assert [step for step, _ in values["eval/return"]] == [0, 200, 400, 450]
    assert values["eval/return"][-1][1] == pytest.approx(summary["eval_return"], rel=1e-6)
    state = torch.load(RUN_DIR / "checkpoint.pt", weights_only=True)
    parts = {"agent", "buffer", "critic", "actor"}
    assert state.keys() == parts | {"args", "step", "env_steps", "eval_csv", "rng"}


def test_a_complete_run_is_left_alone_and_a_larger_total_extends_it(run_main, trained, run_of_400):
    before = files(RUN_DIR)
    # With arguments that cannot change the result, too
    for args in (small(400), [*small(400, checkpoint_every=77), "--save-every", 200]):
        finished = run_main(SCRIPT, *args)
        assert finished.code == 0 and "complete" in finished.out
        assert files(RUN_DIR) == before
    assert run_main(SCRIPT, *small(650)).code == 0
    assert_same_run(RUN_DIR, trained / "650" / RUN_DIR, 650)
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


@pytest.mark.parametrize("lost", ["summary.json and damaged checkpoints", "checkpoints"])
def test_without_an_intact_checkpoint_it_refuses_and_changes_nothing(run_main, run_of_400, lost):
    for file in RUN_DIR.glob("checkpoint*.pt"):
        file.unlink() if lost == "checkpoints" else file.write_bytes(file.read_bytes()[:1000])
    if lost != "checkpoints":
        (RUN_DIR / "summary.json").unlink()
    before = files(RUN_DIR)
    finished = run_main(SCRIPT, *small(400), "--gamma", 0.9)
    assert_refused(finished, "no intact checkpoint in", "remove the directory")
    assert files(RUN_DIR) == before


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("td3", "--critic sa_hyper", ["--critic", "'sa_hyper'", "sa-hyper", "resnet35"]),
        ("td3", "--bach-size 3", ["--bach-size", "--batch-size"]),
        ("td3", "--batch-size 0", ["--batch-size 0: must be at least 1"]),
        ("td3", "--seed -1", ["--seed -1: must be at least 0"]),
        ("td3", "--actor-lr nan", ["--actor-lr nan"]),
        ("td3", "--gamma 1.5", ["--gamma 1.5: must be at most 1"]),
        ("td3", "--primary-widths 8 0", ["--primary-widths 0: must be at least 1"]),
        (
            "td3",
            "--learning-starts 1000000",
            ["--learning-starts 1000000 must be below --total-timesteps 1000000"],
        ),
        ("td3", "--runs-dir /dev/null/runs", ["--runs-dir /dev/null/runs: cannot write"]),
        ("td3", "--device no_such_device", ["--device no_such_device"]),
        ("sac", "--alpha -1", ["--alpha -1.0: must be at least 0"]),
        ("maml", "--env-id Hopper-v4", ["--env-id", "Hopper-v4", *FAMILIES]),
        ("maml", "--num-adapt-steps -1", ["--num-adapt-steps -1: must be at least 0"]),
        ("maml", "--meta-batch-size 101", ["must not be above --num-train-goals"]),
        ("maml", "--max-kl 0", ["--max-kl must be above 0"]),
        ("pearl", "--num-prior-steps 0", ["--num-prior-steps 0: must be at least 1"]),
        ("pearl", "--num-posterior-steps -1", ["--num-posterior-steps -1: must be at least 0"]),
    ],
)
def test_bad_use_says_what_is_wrong_and_leaves_nothing_behind(
    run_main, tmp_path, name, args, words
):
    assert_refused(run_main(ROOT / f"{name}_hyper.py", *args.split()), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantity", ["reward", "observation"])
def test_a_non_finite_reward_or_observation_stops_the_run(run_main, tmp_path, quantity):
    args = ["--env-id", "toy_envs:Truncating-v0", "--env-kwargs", f"bad_{quantity}_at", 33]
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
    assert run_main(SCRIPT, *small(650)).code == 0  # disk space is back


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard_ends_the_run_and_is_said(run_main, monkeypatch):
    write = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", write)
    finished = run_main(SCRIPT, *small(400))
    assert finished.code == 1 and "error: [Errno 28] No space left on device" in finished.err
    assert not (RUN_DIR / "summary.json").exists()


def test_track_needs_wandb_and_a_resumed_process_continues_its_run(run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert_refused(run_main(SCRIPT, "--track"), "pip install wandb")
    wandb = SimpleNamespace(__spec__="is installed", init=Mock())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for steps in (120, 140):
        assert run_main(SCRIPT, *small(steps), "--track").code == 0
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first["id"] == second["id"] == "td3_hyper-InvertedPendulum-v4-mlp-small-seed1"
    assert second["resume"] == "allow" and second["sync_tensorboard"] is True
    assert first["config"]["critic"] == "mlp-small"
