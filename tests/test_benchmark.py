"""benchmark.sh: the matrix, failure, GPUs, interruption, and Slurm with a stand-in for sbatch."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import CRITICS, ENVIRONMENT, ROOT, Finished

from meta_envs import FAMILIES

ENVIRONMENT.pop("CUDA_VISIBLE_DEVICES", None)
ENV = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

# In place of the scripts: mlp fails the first time, mlp-small always, mlp-large is bad use, and
# d2rl hangs, deaf to signals, unless it finds a checkpoint to go on from.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path
words = [part for word in sys.argv for part in word.split("=")]
option = {"--runs-dir": "runs", "--exp-name": words[0][:-3]} | dict(zip(words, words[1:]))
names = [option.get(name) for name in ("--runs-dir", "--exp-name", "--env-id", "--critic")]
critic, run_dir = names[3], Path(*names, "seed" + option["--seed"]).expanduser()
print(os.environ["OMP_NUM_THREADS"], critic, *sys.argv, file=open("tries", "a"))
print(os.environ.get("CUDA_VISIBLE_DEVICES"), file=open("gpus", "a"))
print("an accident", end="")
if critic == "mlp-large":
    sys.exit(2)
resumed = (run_dir / "checkpoint.pt").exists()
run_dir.mkdir(parents=True, exist_ok=True)
(run_dir / "checkpoint.pt").touch()
if critic == "mlp-small" or critic == "mlp" and not resumed:
    sys.exit(3)
if critic == "d2rl" and not resumed:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    time.sleep(60)
(run_dir / "summary.json").touch()
"""


SBATCH = """
echo "$@" >options
[[ $* != *none* ]] || exit 1
script=$(cat)
for id in 0 1; do SLURM_CPUS_PER_TASK=3 SLURM_ARRAY_TASK_ID=$id bash -c "$script"; done
"""


@pytest.fixture
def folder(tmp_path):
    """The launcher among stand-ins for the scripts, in a folder with a space in its name."""
    folder = tmp_path / "a lab"
    folder.mkdir()
    shutil.copy(ROOT / "benchmark.sh", folder)
    for script in ROOT.glob("*_hyper.py"):
        (folder / script.name).write_text(STAND_IN)
    return folder


def put_command(folder: Path, name: str, script: str) -> None:
    """Replaces a command by a bash script."""
    (folder / name).write_text("#!/usr/bin/env bash\n" + script)
    (folder / name).chmod(0o755)


def benchmark(folder: Path, *args: object, **variables: str) -> Finished:
    """Runs the launcher; commands in its folder come before the system's."""
    command = [str(folder / "benchmark.sh"), *map(str, args)]
    env = ENV | {"PATH": f"{folder}:{ENV['PATH']}"} | variables
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    return Finished(done.returncode, done.stdout, done.stderr)


def dry_run(folder: Path, *args: object) -> list[str]:
    """A line for each command with its state, and one of the totals."""
    finished = benchmark(folder, "--dry-run", *args)
    assert finished.code == 0 and not finished.err, finished
    return finished.out.splitlines()


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_the_dry_run_lists_the_445_runs_of_the_paper_or_some_and_writes_nothing(folder):
    before, runs, seeds = sorted(folder.iterdir()), [], range(1, 6)
    environments = ("Hopper", "Walker2d", "Ant", "HalfCheetah")
    for name, env, critic, seed in itertools.product(("td3", "sac"), environments, CRITICS, seeds):
        kwargs = " --env-kwargs ctrl_cost_weight 0.005" * (env == "Ant")
        runs.append(f"{name}_hyper.py --env-id {env}-v4 --critic {critic} --seed {seed}{kwargs}")
    models = "maml vanilla, maml context, maml hyper, pearl mlp, pearl hyper".split(", ")
    for family, (name, model), seed in itertools.product(FAMILIES, map(str.split, models), seeds):
        runs.append(f"{name}_hyper.py --env-id {family} --model {model} --seed {seed}")
    *lines, totals = dry_run(folder)
    assert sorted(lines) == sorted(f"python {run} # missing" for run in runs)
    assert totals == "# 445 runs: 0 complete, 0 partial, 445 missing"
    only = ["--only", "td3.*Hopper-v4 --critic (mlp|sa-hyper) "]
    some = (["--smoke"], 89), (only, 10), ([*only, "--seeds", 2], 4), ([*only, "--smoke"], 2)
    for args, number in some:
        assert len(dry_run(folder, *args)) == number + 1
    assert sorted(folder.iterdir()) == before


def test_a_failure_is_tried_once_more_and_told(folder):
    args = ["--only", "td3.*Hopper-v4.*(mlp|hyper).*--seed 1", "--jobs", 3]
    finished = benchmark(folder, *args)
    assert finished.code == 1, finished
    tries = Counter(line.split()[1] for line in open(folder / "tries"))
    assert tries == {"mlp": 2, "mlp-small": 2, "mlp-large": 1, "as-hyper": 1, "sa-hyper": 1}
    run = "runs/td3_hyper/Hopper-v4"
    for code, critic, times in ((3, "mlp-small", 2), (2, "mlp-large", 1)):
        log = f"{run}/{critic}/seed1.log"
        failure = f"failed with exit code {code}, see {log}: an accident\n"
        assert finished.out.count(failure) == times
        assert f"\nnot complete, see {log}: python td3_hyper.py " in finished.out
        assert (folder / log).read_text().count("an accident") == times
    assert f"complete: {run}/mlp/seed1\n" in finished.out
    assert "\n5 runs: 3 complete, 1 partial, 1 missing\n" in finished.out
    states = Counter(line.split()[-1] for line in dry_run(folder, *args)[:-1])
    assert states == {"complete": 3, "partial": 1, "missing": 1}


def test_the_runs_share_cores_and_gpus_unless_the_user_chooses_a_gpu(folder):
    put_command(folder, "nproc", "echo 8")
    put_command(folder, "nvidia-smi", "echo 'GPU 0: H200\n  MIG 1g.18gb\nGPU 1: H200'")
    for seed, options, variables, gpus in (
        (1, [], {}, {"0\n", "1\n"}),
        (2, [], {"CUDA_VISIBLE_DEVICES": "3"}, {"3\n"}),
        (3, ["--device", "cuda:1"], {}, {"None\n"}),
    ):
        args = ["--only", f"td3.*Hopper-v4.*(hyper|35) --seed {seed}", "--jobs", 3, "--", *options]
        assert benchmark(folder, *args, **variables).code == 0
        assert {*(folder / "gpus").open()} == gpus
        (folder / "gpus").unlink()
    assert {line.split()[0] for line in open(folder / "tries")} == {"2"}  # threads


def test_what_follows_the_dashes_goes_to_the_scripts_and_says_where_the_runs_are(folder):
    args = ["--only", "td3.*Hopper-v4.*sa-hyper --seed 1", "--", "--runs-dir=~/the runs"]
    args += ["--exp-name=try", "--device", "$x; 'y'"]
    assert benchmark(folder, *args, HOME=str(folder)).code == 0
    assert (folder / "tries").read_text().endswith("--device $x; 'y'\n")
    run_dir = "the runs/try/Hopper-v4/sa-hyper/seed1"
    assert (folder / run_dir / "summary.json").exists()
    nothing_to_do = Finished(0, "1 runs: 1 complete, 0 partial, 0 missing\n", "")
    assert benchmark(folder, *args, HOME=str(folder)) == nothing_to_do
    longer = benchmark(folder, *args, "--total-timesteps", "2000", HOME=str(folder))
    assert f"complete: {folder}/{run_dir}" in longer.out


def test_cdpath_does_not_lead_elsewhere(folder, tmp_path):
    (tmp_path / "elsewhere" / folder.name).mkdir(parents=True)
    command = ["bash", f"{folder.name}/benchmark.sh", "--only", "td3.*Hop.*sa-hyper --seed 1"]
    subprocess.run(command, cwd=tmp_path, env=ENV | {"CDPATH": "elsewhere"}, check=True)
    assert (folder / "tries").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_process_outlives_the_launcher_and_the_next_start_resumes(folder, end):
    def processes() -> list[str]:
        find = ["find", "/proc", "-maxdepth", "2", "-name", "cwd", "-lname", folder]
        return subprocess.run(find, capture_output=True, text=True).stdout.splitlines()

    if end != "SIGKILL":  # the others need no help from the kernel
        put_command(folder, "setpriv", "exit 1")
    args = ["--only", "(td3|sac).*Hopper-v4.*--critic d2rl --seed 1", "--jobs", "2"]
    env = ENV | {"PATH": f"{folder}:{ENV['PATH']}"}
    launcher = subprocess.Popen([folder / "benchmark.sh", *args], start_new_session=True, env=env)
    wait_until(lambda: "2 partial" in dry_run(folder, *args)[-1])
    assert len(processes()) >= 4  # the launcher, xargs and the runs
    # Ctrl-C goes to all of a terminal's foreground group, the others to the launcher alone.
    (os.killpg if end == "SIGINT" else os.kill)(launcher.pid, signal.Signals[end])
    assert launcher.wait() == (-signal.SIGKILL if end == "SIGKILL" else 130)
    wait_until(lambda: not processes())
    finished = benchmark(folder, *args)
    assert finished.code == 0 and "2 runs: 2 complete" in finished.out, finished


def test_bad_use_is_one_line_and_starts_nothing(folder):
    for args in ("--jbos 2", "--jobs 0", "--seeds", "--only (td3", "-- --exp-name try"):
        finished = benchmark(folder, *args.split())
        assert finished.code == 2 and not finished.out and finished.err.count("\n") == 1
        assert finished.err.startswith(f"error: {args.split()[-2:][0]}")
    assert not (folder / "tries").exists()


def test_smoke_runs_of_the_four_scripts_learn_and_complete(folder):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    only = "td3.*Ant-v4 --critic mlp |sac.*Hopper-v4 --critic mlp |AntVel-v0 --model (mlp|con)"
    finished = benchmark(folder, "--smoke", "--only", only, "--jobs", 2)
    assert finished.code == 0, finished
    assert finished.out.endswith("4 runs: 4 complete, 0 partial, 0 missing\n")
    for events in (folder / "smoke").rglob("events.*"):
        assert b"losses/" in events.read_bytes(), events


def test_slurm_runs_the_commands_as_tasks_of_an_array(folder):
    put_command(folder, "sbatch", SBATCH)
    args = ["--only", "td3.*Hopper-v4.*hyper --seed 1", "--jobs", 1, "--slurm", "--mem=8G"]
    assert benchmark(folder, *args, "--partition=none").code == 2
    assert not (folder / "tries").exists()
    finished = benchmark(folder, *args, "-p", "gpu", "--", "--device", "$x; 'y'")
    assert finished.code == 0, finished
    assert (folder / "options").read_text() == "--mem=8G -p gpu --array=0-1%1\n"
    assert (folder / "runs/slurm").is_dir()  # without it, Slurm drops the logs
    tries = (folder / "tries").read_text().splitlines()
    assert [line.split()[:2] for line in tries] == [["3", "as-hyper"], ["3", "sa-hyper"]]
    assert all(line.endswith("--device $x; 'y'") for line in tries)
    assert "# 2 runs: 2 complete" in dry_run(folder, *args)[-1]
