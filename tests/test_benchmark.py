"""benchmark.sh: the matrix, interruption, failure, and Slurm, on a real one of one node."""

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, Finished

ENV = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"}

# In place of the scripts: mlp fails the first time, mlp-small always, mlp-large is bad use, and
# d2rl hangs, deaf to signals, unless it finds a checkpoint to go on from.
STAND_IN = """
import argparse, os, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for option in ("--env-id", "--critic", "--seed"):
    parser.add_argument(option)
parser.add_argument("--runs-dir", default="runs")
parser.add_argument("--exp-name", default=Path(sys.argv[0]).stem)
args, _ = parser.parse_known_args()
with open("tries", "a") as tries:
    print(os.environ["OMP_NUM_THREADS"], args.critic, *sys.argv, file=tries)
print("an accident", end="")
if args.critic == "mlp-large":
    sys.exit(2)
run_dir = Path(args.runs_dir, args.exp_name, args.env_id, args.critic, "seed" + args.seed)
resumed = (run_dir / "checkpoint.pt").exists()
run_dir.mkdir(parents=True, exist_ok=True)
(run_dir / "checkpoint.pt").touch()
if args.critic == "mlp-small" or args.critic == "mlp" and not resumed:
    sys.exit(3)
if args.critic == "d2rl" and not resumed:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
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
    for algorithm in ("td3", "sac", "maml", "pearl"):
        (folder / f"{algorithm}_hyper.py").write_text(STAND_IN)
    return folder


def benchmark(folder: Path, *args: object, env=ENV) -> Finished:
    command = [str(folder / "benchmark.sh"), *map(str, args)]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    return Finished(done.returncode, done.stdout, done.stderr)


def dry_run(folder: Path, *args: object) -> tuple[dict[str, str], str]:
    """Each command with its state, and the line of the totals."""
    finished = benchmark(folder, "--dry-run", *args)
    assert finished.code == 0 and not finished.err, finished
    *runs, totals = finished.out.splitlines()
    states = dict(line.rsplit(" # ", 1) for line in runs)
    assert len(states) == len(runs)
    return states, totals


def wait_until(condition, seconds: float = 300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_the_dry_run_lists_the_445_runs_of_the_paper_and_writes_nothing(folder):
    expected = set()
    critics = "mlp mlp-small mlp-large resnet-features resnet35 d2rl as-hyper sa-hyper"
    families = "HalfCheetahFwdBack AntFwdBack HalfCheetahVel AntVel HalfCheetahVelMedium".split()
    for seed in range(1, 6):
        environments = ("Hopper-v4", "Walker2d-v4", "Ant-v4", "HalfCheetah-v4")
        for name, env, critic in itertools.product(("td3", "sac"), environments, critics.split()):
            reduced_control_cost = " --env-kwargs ctrl_cost_weight 0.005" * (env == "Ant-v4")
            run = f"--env-id {env} --critic {critic} --seed {seed}{reduced_control_cost}"
            expected.add(f"python {name}_hyper.py {run}")
        for name, models in (("maml", "vanilla context hyper"), ("pearl", "mlp hyper")):
            for family, model in itertools.product(families, models.split()):
                run = f"--env-id {family}-v0 --model {model} --seed {seed}"
                expected.add(f"python {name}_hyper.py {run}")
    assert len(expected) == 445
    before = sorted(folder.iterdir())
    states, totals = dry_run(folder)
    assert states == dict.fromkeys(expected, "missing")
    assert totals == "# 445 runs: 0 complete, 0 partial, 445 missing"
    assert sorted(folder.iterdir()) == before


def test_only_seeds_and_smoke_choose_among_the_runs(folder):
    only = ["--only", "td3.*Hopper-v4 --critic (mlp|sa-hyper) "]
    assert len(dry_run(folder, *only)[0]) == 10
    assert len(dry_run(folder, *only, "--seeds", 2)[0]) == 4
    assert len(dry_run(folder, *only, "--smoke")[0]) == 2
    assert len(dry_run(folder, "--smoke")[0]) == 89
    assert len(dry_run(folder, "--only", "Ant-v4.*mlp --seed 2$", "--smoke", "--seeds", 2)[0]) == 2


def test_a_failure_is_tried_once_more_and_told_and_what_is_complete_is_skipped(stand_ins):
    (stand_ins / "nproc").write_text("#!/bin/sh\necho 8\n")
    (stand_ins / "nproc").chmod(0o755)
    args = ["--only", "td3.*Hopper-v4.*(mlp|hyper).*--seed 1", "--jobs", 3]
    finished = benchmark(stand_ins, *args, env=ENV | {"PATH": f"{stand_ins}:{ENV['PATH']}"})
    assert finished.code == 1, finished
    tries = [line.split()[:2] for line in open(stand_ins / "tries")]
    assert {threads for threads, _ in tries} == {"2"}  # 8 cores, 3 jobs
    critics = Counter(critic for _, critic in tries)
    assert critics == {"mlp": 2, "mlp-small": 2, "mlp-large": 1, "as-hyper": 1, "sa-hyper": 1}

    run = "runs/td3_hyper/Hopper-v4"
    failure = f"failed with exit code 3, see {run}/mlp-small/seed1.log: an accident\n"
    assert finished.out.count(failure) == 2
    failure = f"failed with exit code 2, see {run}/mlp-large/seed1.log: an accident\n"
    assert finished.out.count(failure) == 1
    assert finished.out.count(f"complete: {run}/mlp/seed1\n") == 1
    totals, *failures = finished.out.splitlines()[-3:]
    assert totals == "5 runs: 3 complete, 1 partial, 1 missing"
    for line, critic in zip(failures, ("mlp-small", "mlp-large")):
        assert line.startswith(f"not complete, see {run}/{critic}/seed1.log: python td3_hyper.py ")
    assert (stand_ins / run / "mlp-small/seed1.log").read_text().count("an accident") == 2
    states, _ = dry_run(stand_ins, *args)
    assert Counter(states.values()) == {"complete": 3, "partial": 1, "missing": 1}

    assert benchmark(stand_ins, *args).code == 1
    again = Counter(line.split()[1] for line in open(stand_ins / "tries")) - critics
    assert again == {"mlp-small": 2, "mlp-large": 1}
    finished = benchmark(stand_ins, "--only", "td3.*Hopper-v4.*-hyper --seed 1")
    assert finished == Finished(0, "2 runs: 2 complete, 0 partial, 0 missing\n", "")


def test_what_follows_the_dashes_goes_to_the_scripts_and_says_where_the_runs_are(stand_ins):
    args = ["--only", "td3.*Hopper-v4.*sa-hyper --seed 1", "--", "--runs-dir", "the runs"]
    args += ["--exp-name=try", "--device", "$x; 'y'"]
    finished = benchmark(stand_ins, *args)
    assert finished.code == 0, finished
    assert (stand_ins / "tries").read_text().endswith("--device $x; 'y'\n")
    assert (stand_ins / "the runs/try/Hopper-v4/sa-hyper/seed1/summary.json").exists()
    assert benchmark(stand_ins, *args).out == "1 runs: 1 complete, 0 partial, 0 missing\n"
    # Only the script can tell whether the run is that long already.
    finished = benchmark(stand_ins, *args, "--total-timesteps", "2000000")
    assert finished.code == 0 and "complete: the runs/try/Hopper-v4/sa-hyper/seed1" in finished.out
    oracle = stand_ins / "runs/pearl_hyper/AntVel-v0/mlp-oracle/seed1"
    oracle.mkdir(parents=True)
    (oracle / "summary.json").touch()
    args = ["--only", "pearl.*AntVel-v0 --model mlp --seed 1", "--"]
    assert [*dry_run(stand_ins, *args, "--context", "oracle")[0].values()] == ["complete"]
    assert [*dry_run(stand_ins, *args, "--context", "learned")[0].values()] == ["missing"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_process_outlives_the_launcher_and_the_next_start_resumes(stand_ins, tmp_path, end):
    def processes() -> list[int]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                zombie = not (process / "cmdline").read_text()
                if (process / "cwd").readlink() == stand_ins and not zombie:
                    found.append(int(process.name))
            except OSError:  # it ended
                continue
        return found

    if end != "SIGKILL":  # the others need no help from the kernel
        (tmp_path / "setpriv").symlink_to("/bin/false")
    args = ["--only", "(td3|sac).*Hopper-v4.*--critic d2rl --seed 1", "--jobs", "2"]
    launcher = subprocess.Popen(
        [stand_ins / "benchmark.sh", *args],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stdout=subprocess.DEVNULL,
        env=ENV | {"PATH": f"{tmp_path}:{ENV['PATH']}"},
    )
    try:
        wait_until(lambda: "2 partial" in dry_run(stand_ins, *args)[1])
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


@pytest.mark.parametrize(
    "args, words",
    [
        (["--jbos", "2"], "--jbos: unknown option"),
        (["--jobs", "0"], "--jobs 0: not an integer"),
        (["--seeds"], "--seeds needs a value"),
        (["--only", "(td3"], "--only (td3: no command"),
        (["--", "--exp-name", "try"], "--exp-name try: two algorithms"),
    ],
)
def test_bad_use_is_one_line_and_starts_nothing(stand_ins, args, words):
    finished = benchmark(stand_ins, *args)
    assert finished.code == 2 and not finished.out
    assert finished.err.startswith(f"error: {words}") and finished.err.count("\n") == 1
    assert not (stand_ins / "tries").exists()


def test_help_tells_of_every_option(folder):
    finished = benchmark(folder, "--help")
    assert finished.code == 0 and finished.out.startswith("usage: ./benchmark.sh")
    for option in "--dry-run --only --seeds --jobs --smoke --slurm --".split():
        assert f"\n  {option} " in finished.out


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="apt-get install shellcheck")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", ROOT / "benchmark.sh"], check=True)


def test_smoke_runs_of_the_four_scripts_learn_and_complete(folder):
    only = "td3.*Ant-v4 --critic mlp |sac.*Hopper-v4 --critic sa-hyper |AntVel-v0 --model (mlp|con)"
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
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
KillWait=2
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
def slurm():
    """A Slurm of one node on loopback: two CPUs, a partition `high` that preempts `low`."""
    if os.geteuid() or not all(shutil.which(d, path=ENV["PATH"]) for d in ("munged", "slurmctld")):
        pytest.skip("needs root and apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a short name: sockets need one
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports.append(server.getsockname()[1])
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, ports=ports, folder=folder))
    (folder / "state").mkdir(), (folder / "spool").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    env = ENV | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    munge += ["--foreground", "--force", f"--socket={folder}/munge.socket"]
    daemons = []

    def call(*command: str) -> str:
        return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()

    try:
        for command in (["munged", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            output = open(folder / f"{command[0]}.out", "w")
            both = {"stdout": output, "stderr": output}
            daemons.append(subprocess.Popen(command, env=env, cwd=folder, **both))
            wait_until((folder / "munge.socket").exists, 20)
        wait_until(lambda: call("sinfo", "--noheader", "-p", "low", "-o", "%t") == "idle", 30)
        yield env, call
        call("scancel", "--me")
        wait_until(lambda: not call("squeue", "--noheader"), 30)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
        shutil.rmtree(folder)


def test_slurm_resumes_what_was_preempted_and_a_run_that_is_queued_twice_is_harmless(folder, slurm):
    env, call = slurm
    finished = benchmark(folder, "--slurm", "--partition=none", env=env)
    assert finished.code == 2 and "invalid partition" in finished.err, finished
    args = ["--smoke", "--only", "td3.*Hopper-v4.*--critic (mlp|mlp-small) ", "--jobs", "1"]
    args += ["--slurm", "-p", "low", "--mem=1", "--"]
    args += ["--total-timesteps", "2000", "--eval-every", "1000", "--checkpoint-every", "100"]
    for job in (1, 2):
        finished = benchmark(folder, *args, env=env)
        assert finished.code == 0 and f"Submitted batch job {job}\n" in finished.out, finished
    run_dir = folder / "smoke/td3_hyper/Hopper-v4/mlp/seed1"

    def first_tasks() -> str:
        return "".join(log.read_text() for log in folder.glob("smoke/slurm/?_0.log"))

    wait_until(lambda: "failed with exit code 2" in first_tasks())
    log = run_dir.with_name("seed1.log")
    assert "another process is training" in log.read_text()
    wait_until((run_dir / "checkpoint.prev.pt").exists)
    call("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait_until(lambda: "PREEMPTION" in first_tasks())
    assert not (run_dir / "summary.json").exists()
    wait_until(lambda: not call("squeue", "--noheader"))
    starts = re.findall(r"global_step (\d+) of 2000", log.read_text())
    assert len(starts) == 2 and starts[0] == "0" != starts[1]
    finished = benchmark(folder, *args[:3])  # all is complete, so this starts nothing
    assert finished == Finished(0, "2 runs: 2 complete, 0 partial, 0 missing\n", "")
