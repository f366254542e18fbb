"""benchmark.sh: the matrix, interruption, failure, and Slurm, on a real one of one node."""

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import CRITICS, ENVIRONMENT, ROOT, Finished

from meta_envs import FAMILIES

ENVIRONMENT.pop("CUDA_VISIBLE_DEVICES", None)
ENV = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"}

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
    time.sleep(1000)
(run_dir / "summary.json").touch()
"""


@pytest.fixture
def folder(tmp_path):
    """A copy of the launcher and the scripts, in a folder with a space in its name."""
    folder = tmp_path / "a lab"
    folder.mkdir()
    for file in (*ROOT.glob("*.py"), ROOT / "benchmark.sh"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def stand_ins(folder):
    """The launcher among stand-ins for the scripts."""
    for script in folder.glob("*_hyper.py"):
        script.write_text(STAND_IN)
    return folder


def benchmark(folder: Path, *args: object, env=ENV) -> Finished:
    command = [str(folder / "benchmark.sh"), *map(str, args)]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    return Finished(done.returncode, done.stdout, done.stderr)


def dry_run(folder: Path, *args: object) -> list[str]:
    """A line for each command with its state, and one of the totals."""
    finished = benchmark(folder, "--dry-run", *args)
    assert finished.code == 0 and not finished.err, finished
    return finished.out.splitlines()


def wait_until(condition, seconds: float = 300):
    end = time.monotonic() + seconds
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


def test_a_failure_is_tried_once_more_and_told_and_what_is_complete_is_skipped(stand_ins):
    two_gpus = "GPU 0: H200\n  MIG 1g.18gb\nGPU 1: H200"
    for name, output in ("nproc", "8"), ("nvidia-smi", two_gpus):
        (stand_ins / name).write_text(f"#!/bin/sh\necho '{output}'\n")
        (stand_ins / name).chmod(0o755)
    env = ENV | {"PATH": f"{stand_ins}:{ENV['PATH']}"}
    args = ["--only", "td3.*Hopper-v4.*(mlp|hyper).*--seed 1", "--jobs", 3]
    finished = benchmark(stand_ins, *args, env=env)
    assert finished.code == 1, finished
    assert {*open(stand_ins / "gpus")} == {"0\n", "1\n"}
    tries = [line.split()[:2] for line in open(stand_ins / "tries")]
    assert {threads for threads, _ in tries} == {"2"}  # 8 cores, 3 jobs
    critics = Counter(critic for _, critic in tries)
    assert critics == {"mlp": 2, "mlp-small": 2, "mlp-large": 1, "as-hyper": 1, "sa-hyper": 1}

    run = "runs/td3_hyper/Hopper-v4"
    for code, critic, times in ((3, "mlp-small", 2), (2, "mlp-large", 1)):
        log = f"{run}/{critic}/seed1.log"
        failure = f"failed with exit code {code}, see {log}: an accident\n"
        assert finished.out.count(failure) == times
        assert f"\nnot complete, see {log}: python td3_hyper.py " in finished.out
        assert (stand_ins / log).read_text().count("an accident") == times
    assert f"complete: {run}/mlp/seed1\n" in finished.out
    assert "\n5 runs: 3 complete, 1 partial, 1 missing\n" in finished.out
    states = Counter(line.split()[-1] for line in dry_run(stand_ins, *args)[:-1])
    assert states == {"complete": 3, "partial": 1, "missing": 1}

    # With a GPU that the user has chosen, in one way or another
    for options, visible in ([], {"CUDA_VISIBLE_DEVICES": "3"}), (["--device", "cuda:1"], {}):
        assert benchmark(stand_ins, *args, "--", *options, env=env | visible).code == 1
        gpu = visible.get("CUDA_VISIBLE_DEVICES")
        assert (stand_ins / "gpus").read_text().endswith(3 * f"{gpu}\n")
    again = Counter(line.split()[1] for line in open(stand_ins / "tries")) - critics
    assert again == {"mlp-small": 4, "mlp-large": 2}


def test_what_follows_the_dashes_goes_to_the_scripts_and_says_where_the_runs_are(stand_ins):
    args = ["--only", "td3.*Hopper-v4.*sa-hyper --seed 1", "--", "--runs-dir=~/the runs"]
    args += ["--exp-name=try", "--device", "$x; 'y'"]
    env = ENV | {"HOME": str(stand_ins)}
    assert benchmark(stand_ins, *args, env=env).code == 0
    assert (stand_ins / "tries").read_text().endswith("--device $x; 'y'\n")
    run_dir = "the runs/try/Hopper-v4/sa-hyper/seed1"
    assert (stand_ins / run_dir / "summary.json").exists()
    nothing_to_do = Finished(0, "1 runs: 1 complete, 0 partial, 0 missing\n", "")
    assert benchmark(stand_ins, *args, env=env) == nothing_to_do
    # Only the script can tell whether the run is that long already.
    longer = benchmark(stand_ins, *args, "--total-timesteps", "2000", env=env)
    assert f"complete: {stand_ins}/{run_dir}" in longer.out
    args = ["--only", "pearl.*AntVel-v0 --model mlp --seed 1", "--", "--context", "oracle"]
    assert "runs/pearl_hyper/AntVel-v0/mlp-oracle/seed1.log" in benchmark(stand_ins, *args).out


def test_cdpath_does_not_lead_elsewhere(stand_ins, tmp_path):
    (tmp_path / "elsewhere" / stand_ins.name).mkdir(parents=True)
    command = ["bash", f"{stand_ins.name}/benchmark.sh", "--only", "td3.*Hop.*sa-hyper --seed 1"]
    subprocess.run(command, cwd=tmp_path, env=ENV | {"CDPATH": "elsewhere"}, check=True)
    assert (stand_ins / "tries").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_process_outlives_the_launcher_and_the_next_start_resumes(stand_ins, tmp_path, end):
    def processes() -> list[int]:
        find = ["find", "/proc", "-maxdepth", "2", "-name", "cwd", "-lname", stand_ins]
        found = subprocess.run(find, capture_output=True, text=True).stdout
        return [int(line.split("/")[2]) for line in found.splitlines()]

    if end != "SIGKILL":  # the others need no help from the kernel
        (tmp_path / "setpriv").symlink_to("/bin/false")
    args = ["--only", "(td3|sac).*Hopper-v4.*--critic d2rl --seed 1", "--jobs", "2"]
    launcher = subprocess.Popen(
        [stand_ins / "benchmark.sh", *args],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=ENV | {"PATH": f"{tmp_path}:{ENV['PATH']}"},
    )
    try:
        wait_until(lambda: "2 partial" in dry_run(stand_ins, *args)[-1])
        assert len(processes()) >= 4  # the launcher, xargs and the runs
        # Ctrl-C goes to all of a terminal's foreground group, the others to the launcher alone.
        (os.killpg if end == "SIGINT" else os.kill)(launcher.pid, signal.Signals[end])
        assert launcher.wait() == (-signal.SIGKILL if end == "SIGKILL" else 130)
        wait_until(lambda: not processes(), 5)
    finally:
        for pid in processes():
            os.kill(pid, signal.SIGKILL)
    finished = benchmark(stand_ins, *args)
    assert finished.code == 0 and "2 runs: 2 complete" in finished.out, finished


def test_bad_use_is_one_line_and_starts_nothing(stand_ins):
    for args in ("--jbos 2", "--jobs 0", "--seeds", "--only (td3", "-- --exp-name try"):
        finished = benchmark(stand_ins, *args.split())
        assert finished.code == 2 and not finished.out and finished.err.count("\n") == 1
        assert finished.err.startswith(f"error: {args.split()[-2:][0]}")
    assert not (stand_ins / "tries").exists()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="apt-get install shellcheck")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", ROOT / "benchmark.sh"], check=True)


def test_smoke_runs_of_the_four_scripts_learn_and_complete(folder):
    only = "td3.*Ant-v4 --critic mlp |sac.*Hopper-v4 --critic mlp |AntVel-v0 --model (mlp|con)"
    finished = benchmark(folder, "--smoke", "--only", only, "--jobs", 2)
    assert finished.code == 0, finished
    assert finished.out.endswith("4 runs: 4 complete, 0 partial, 0 missing\n")
    for events in (folder / "smoke").rglob("events.*"):
        assert b"losses/" in events.read_bytes(), events


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
JobRequeue=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes={host} PriorityTier=1
PartitionName=high Nodes={host} PriorityTier=10
"""


@pytest.fixture
def slurm(tmp_path):
    """A Slurm of one node on loopback: two CPUs, a partition `high` that preempts `low`."""
    if os.geteuid() or not shutil.which("slurmctld", path=ENV["PATH"]):
        pytest.skip("needs root and apt-get install slurm-wlm")
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        ports = a.getsockname()[1], b.getsockname()[1]
    host = socket.gethostname().split(".")[0]
    (tmp_path / "slurm.conf").write_text(SLURM_CONF.format(host=host, ports=ports, folder=tmp_path))
    env = ENV | {"SLURM_CONF": str(tmp_path / "slurm.conf")}

    def call(*command: str) -> str:
        return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()

    daemons = []
    try:
        for name, directory in (("slurmctld", "state"), ("slurmd", "spool")):
            (tmp_path / directory).mkdir()
            daemons.append(subprocess.Popen([name, "-D"], env=env))
        wait_until(lambda: call("sinfo", "--noheader", "-p", "low", "-o", "%t") == "idle", 30)
        yield env, call
        call("scancel", "--me")
        wait_until(lambda: not call("squeue", "--noheader"), 30)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def test_slurm_resumes_what_was_preempted_and_a_run_that_is_queued_twice_is_harmless(folder, slurm):
    env, call = slurm
    assert benchmark(folder, "--slurm", "--partition=none", env=env).code == 2
    args = ["--jobs", "1", "--slurm", "-p", "low", "--mem=1", "--"]
    args += ["--total-timesteps", "2000", "--eval-every", "1000", "--checkpoint-every", "100"]
    for critics in ("(mlp|mlp-small)", "mlp"):
        only = "--smoke", "--only", f"td3.*Hopper-v4.*--critic {critics} "
        finished = benchmark(folder, *only, *args, env=env)
        assert finished.code == 0 and "Submitted batch job" in finished.out, finished
    run_dir = folder / "smoke/td3_hyper/Hopper-v4/mlp/seed1"
    log = run_dir.with_name("seed1.log")

    def first_tasks() -> str:
        return "".join(log.read_text() for log in folder.glob("smoke/slurm/?_0.log"))

    wait_until(lambda: "failed with exit code 2" in first_tasks())
    assert "another process is training" in log.read_text()
    wait_until((run_dir / "checkpoint.prev.pt").exists)
    call("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait_until(lambda: "PREEMPTION" in first_tasks())
    assert not (run_dir / "summary.json").exists()
    wait_until(lambda: not call("squeue", "--noheader"))
    starts = re.findall(r"global_step (\d+) of 2000", log.read_text())
    assert len(starts) == 2 and starts[0] == "0" != starts[1]
    finished = benchmark(folder, "--smoke", "--only", "td3.*Hopper-v4.*--critic (mlp|mlp-small) ")
    assert finished == Finished(0, "2 runs: 2 complete, 0 partial, 0 missing\n", "")
