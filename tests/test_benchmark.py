"""benchmark.sh: the matrix, interruption, failure, and Slurm, on a real one of one node."""

import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, Finished
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import td3_hyper

BENCHMARK = ROOT / "benchmark.sh"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
OPTIONS = {"env": ENVIRONMENT | {"PATH": PATH}, "text": True}
CRITICS = "mlp mlp-small mlp-large resnet-features resnet35 d2rl as-hyper sa-hyper".split()
FAMILIES = "HalfCheetahFwdBack AntFwdBack HalfCheetahVel AntVel HalfCheetahVelMedium".split()


@pytest.fixture
def folder(tmp_path):
    """A working directory with a space in its name."""
    (tmp_path / "a lab").mkdir()
    return tmp_path / "a lab"


def benchmark(*args: object, cwd: Path, script: Path = BENCHMARK, **options) -> Finished:
    command = [str(script), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, **(OPTIONS | options))
    return Finished(done.returncode, done.stdout, done.stderr)


def dry_run(*args: object, cwd: Path, **options) -> tuple[dict[str, str], str]:
    """Each command with its state, and the line of the totals."""
    finished = benchmark("--dry-run", *args, cwd=cwd, **options)
    assert finished.code == 0 and not finished.err, finished
    *runs, totals = finished.out.splitlines()
    states = dict(line.rsplit(" # ", 1) for line in runs)
    assert len(states) == len(runs)
    return states, totals


def wait_until(condition, seconds: float = 120):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
    return result


def processes(marker: Path) -> dict[int, str]:
    """Command lines of the living processes that have `marker` for their working directory."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == marker:
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it ended
            continue
    return {pid: command for pid, command in found.items() if command}  # a zombie has none


def test_the_dry_run_lists_the_445_runs_of_the_paper_and_writes_nothing(folder):
    expected = set()
    for seed in map(str, range(1, 6)):
        environments = ["Hopper-v4", "Walker2d-v4", "Ant-v4", "HalfCheetah-v4"]
        for algorithm, env, critic in itertools.product(("td3", "sac"), environments, CRITICS):
            expected.add((f"{algorithm}_hyper.py", env, critic, seed))
        for family in FAMILIES:
            for model in ("vanilla", "context", "hyper"):
                expected.add(("maml_hyper.py", f"{family}-v0", model, seed))
            for model in ("mlp", "hyper"):
                expected.add(("pearl_hyper.py", f"{family}-v0", model, seed))
    assert len(expected) == 445

    states, totals = dry_run(cwd=folder)
    listed = set()
    for python, script, *words in map(shlex.split, states):
        args = dict(zip(words[::2], words[1::2]))
        env, seed = args.pop("--env-id"), args.pop("--seed")
        model = args.pop("--critic" if env[-1] == "4" else "--model")
        reduced_control_cost = {"--env-kwargs": '{"ctrl_cost_weight": 0.005}'}
        assert args == (reduced_control_cost if env == "Ant-v4" else {})
        assert python == "python" and Path(script).parent == ROOT
        listed.add((Path(script).name, env, model, seed))
    assert listed == expected
    assert set(states.values()) == {"not started"}
    assert totals.startswith("# 445 runs: 0 complete, 0 partial, 0 failed, 445 not started")
    assert list(folder.iterdir()) == []


# A run of each script: two commands to paste, two for the launcher.
FOUR = (
    r"td3.*Ant-v4.* --critic mlp |sac.*Hopper-v4.* --critic sa-hyper |AntVel-v0 --model (mlp|con)"
)


def test_smoke_runs_learn_evaluate_and_complete_pasted_and_launched(folder):
    project = folder / "its copy"
    project.mkdir()
    for file in (*ROOT.glob("*.py"), BENCHMARK):
        shutil.copy(file, project)
    options = {"cwd": folder, "script": project / "benchmark.sh"}
    states, _ = dry_run("--smoke", "--only", FOUR, **options)
    assert [state for state in states.values()] == ["not started"] * 4
    assert all(f"python '{project}/" in command for command in states)
    pasted = next(command for command in states if "td3" in command)
    subprocess.run(["bash", "-c", pasted], cwd=folder, check=True, **OPTIONS)

    finished = benchmark("--smoke", "--only", FOUR, "--jobs", 2, **options)
    assert finished.code == 0, finished
    assert finished.out.count("start ") == 3 and "4 runs: 4 complete" in finished.out
    again = benchmark("--smoke", "--only", FOUR, **options)
    assert again.code == 0 and again.out.startswith("4 runs: 4 complete")

    summaries = sorted((folder / "smoke").rglob("summary.json"))
    names = [summary.relative_to(folder / "smoke").parts[0] for summary in summaries]
    assert names == ["maml_hyper", "pearl_hyper", "sac_hyper", "td3_hyper"]
    for summary in summaries:
        scalars = EventAccumulator(str(summary.parent)).Reload().Tags()["scalars"]
        assert any(name.startswith("losses/") for name in scalars), summary
        evaluations = (summary.parent / "eval.csv").read_text().splitlines()[1:]
        assert len({row.split(",")[0] for row in evaluations}) > 1
        args = json.loads((summary.parent / "config.json").read_text())["args"]
        if args["exp_name"] == "td3_hyper":
            assert json.loads(args["env_kwargs"])["ctrl_cost_weight"] == 0.005


def test_states_are_those_of_the_run_directories_and_the_arguments(folder, monkeypatch):
    for critic in CRITICS[:-1]:
        monkeypatch.setattr(sys, "argv", ["", "--env-id", "Hopper-v4", "--critic", critic])
        args = vars(td3_hyper.parse_args())
        run_dir = folder / "runs" / "td3_hyper" / "Hopper-v4" / critic / "seed1"
        log = folder / "runs" / "logs" / "td3_hyper" / "Hopper-v4" / critic / "seed1.log"
        run_dir.mkdir(parents=True)
        log.parent.mkdir(parents=True)
        if critic in ("mlp", "mlp-large", "resnet35", "d2rl"):
            (run_dir / "summary.json").write_text("{}")
        if critic in ("mlp-small", "as-hyper"):
            log.write_text("error: an accident\nfailed: exit code 1\n")
        if critic == "mlp-large":
            args["gamma"] = 0.9
        if critic == "resnet35":
            args["total_timesteps"] = 1000
        if critic == "d2rl":  # trained on a node that has a GPU, unlike this one
            args |= {"device": "cuda", "checkpoint_every": 7}
        if critic != "as-hyper":
            (run_dir / "config.json").write_text(json.dumps({"args": args}))
    states, totals = dry_run("--only", "td3.*Hopper-v4.*--seed 1", cwd=folder)
    assert {command.split(" --critic ")[1].split()[0]: s for command, s in states.items()} == {
        "mlp": "complete",
        "d2rl": "complete",
        "mlp-small": "failed",
        "as-hyper": "failed",
        "mlp-large": "other arguments",
        "resnet35": "partial",  # the command asks for more steps
        "resnet-features": "partial",
        "sa-hyper": "not started",
    }
    counts = "2 complete, 2 partial, 2 failed, 1 not started, 1 other arguments"
    assert totals == f"# 8 runs: {counts}"


def test_a_run_directory_that_the_script_would_refuse_is_left_alone(folder, tmp_path):
    configs = ['{"args": {"total_timesteps": null}}', '{"args": []}', "{", None]
    for seed, config in enumerate(configs, start=1):
        run_dir = folder / f"runs/td3_hyper/Hopper-v4/mlp/seed{seed}"
        run_dir.mkdir(parents=True)
        (run_dir / "checkpoint.pt").touch()
        if config:
            (run_dir / "config.json").write_text(config)
    stand_in("echo $* >>tries", tmp_path / "bin")
    options = {"cwd": folder, "env": OPTIONS["env"] | {"PATH": f"{tmp_path / 'bin'}:{PATH}"}}
    only = ["--only", "td3.*Hopper-v4.*--critic mlp ", "--seeds"]
    finished = benchmark(*only, 5, **options)
    assert finished.code == 1, finished
    assert len((folder / "tries").read_text().splitlines()) == 1
    *_, total, one, _, _, four = finished.out.splitlines()
    assert total.startswith("5 runs: 1 complete") and total.endswith(" 4 other arguments")
    assert one.startswith("other arguments: python") and " --seed 4 #" in four
    assert not (folder / "runs/logs/td3_hyper/Hopper-v4/mlp/seed1.log").exists()
    finished = benchmark(*only, 4, **options)
    assert finished.code == 1 and "start 1/" not in finished.out


def without(*names: str, folder: Path) -> str:
    """A PATH on which some of the installed commands are missing."""
    folder.mkdir()
    for command in (*Path("/usr/bin").iterdir(), *Path("/bin").iterdir()):
        if command.name not in names and not (folder / command.name).exists():
            (folder / command.name).symlink_to(command)
    return f"{Path(sys.executable).parent}:{folder}"


def stand_in(script: str, folder: Path) -> None:
    """A `python` that runs `script` in place of training; the launcher's own `-c` is Python."""
    folder.mkdir()
    (folder / "python").write_text(
        f'#!/usr/bin/env bash\n[[ $1 != -c ]] || exec {shlex.quote(sys.executable)} "$@"\n{script}'
    )
    (folder / "python").chmod(0o755)


TWO = ["--only", "td3.*Hopper-v4.*--critic (mlp|mlp-small) --seed 1"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name
)
def test_no_process_outlives_the_script(folder, tmp_path, end):
    stand_in("trap '' INT TERM; exec sleep 1000", tmp_path / "bin")
    # Against SIGKILL the kernel's help is needed, else the script's own is enough.
    path = PATH if end == signal.SIGKILL else without("setpriv", folder=tmp_path / "few")
    process = subprocess.Popen(
        [BENCHMARK, "--jobs", "2", *TWO],
        cwd=folder,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stdout=subprocess.DEVNULL,
        env=OPTIONS["env"] | {"PATH": f"{tmp_path / 'bin'}:{path}"},
    )
    try:
        wait_until(lambda: str(processes(folder)).count("sleep 1000") == 2)
        if end == signal.SIGINT:
            os.killpg(process.pid, end)  # as a terminal does
        else:
            process.send_signal(end)
        code = {signal.SIGINT: 130, signal.SIGTERM: 143}.get(end, -end)
        assert process.wait() == code
        wait_until(lambda: not processes(folder), 5)
    finally:
        for pid in processes(folder):
            os.kill(pid, signal.SIGKILL)
    assert not any("failed" in log.read_text() for log in folder.rglob("*.log"))


def test_after_sigkill_the_next_start_resumes_and_completes_what_is_missing(folder):
    only = ["--only", "td3.*Hopper-v4.*--critic mlp "]
    args = ["--smoke", *only, "--", "--total-timesteps", "2000", "--eval-every", "1000"]
    process = subprocess.Popen([BENCHMARK, *args], cwd=folder, stdout=subprocess.DEVNULL, **OPTIONS)
    run_dir = folder / "smoke/td3_hyper/Hopper-v4/mlp/seed1"
    wait_until((run_dir / "checkpoint.pt").exists)
    process.kill()
    process.wait()
    finished = benchmark(*args, cwd=folder)
    assert finished.code == 0 and finished.out.startswith("1 runs: 0 complete, 1 partial")
    log = (folder / "smoke/logs/td3_hyper/Hopper-v4/mlp/seed1.log").read_text()
    assert "resuming" in log and log.endswith("is complete\ncomplete\n")


def test_a_failure_is_tried_once_more_named_and_the_exit_code(folder, tmp_path):
    """mlp fails once, mlp-small always, mlp-large is bad use, another process has resnet35."""
    stand_in(
        """echo "$OMP_NUM_THREADS $*" >>tries
        case $* in
        *"--critic mlp "*) [[ $(grep -c -e "--critic mlp " tries) == 2 ]] ;;
        *mlp-small*) printf "error: an accident" >&2; exit 3 ;;
        *mlp-large*) echo "error: bad use" >&2; exit 2 ;;
        *resnet35*) echo "error: another process is training in it" >&2; exit 2 ;;
        *d2rl*) printf "no newline at the end" ;;
        esac""",
        tmp_path / "bin",
    )
    (tmp_path / "bin" / "nproc").write_text("#!/bin/sh\necho 8\n")
    (tmp_path / "bin" / "nproc").chmod(0o755)
    environment = {"env": OPTIONS["env"] | {"PATH": f"{tmp_path / 'bin'}:{PATH}"}}
    only = ["--only", "td3.*Hopper-v4.*--seed 1"]
    finished = benchmark(*only, "--jobs", 3, cwd=folder, **environment)
    assert finished.code == 1, finished
    tries = (folder / "tries").read_text().splitlines()
    count = {c: sum(f"--critic {c} " in line for line in tries) for c in CRITICS}
    assert count == dict.fromkeys(CRITICS, 1) | {"mlp": 2, "mlp-small": 2}
    assert {line.split()[0] for line in tries} == {"2"}  # 8 cores, 3 jobs

    *_, total, one, two, three = finished.out.splitlines()
    assert total.startswith("8 runs: 5 complete, 1 partial, 2 failed")
    for line, critic in ((one, "mlp-small"), (two, "mlp-large")):
        log = f"runs/logs/td3_hyper/Hopper-v4/{critic}/seed1.log"
        assert line.startswith("failed: python") and line.endswith(f"# {log}")
        assert (folder / log).read_text().splitlines()[-1].startswith("failed: exit code")
    assert three.startswith("partial: python") and "resnet35" in three
    assert (
        "exit code 3: runs/logs/td3_hyper/Hopper-v4/mlp-small/seed1.log: error: an" in finished.out
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (["--jbos", "2"], ["--jbos", "--help"]),
        (["td3"], ["td3", "--help"]),
        (["--jobs", "0"], ["--jobs 0", "1 to 9999"]),
        (["--jobs", "two"], ["--jobs two", "integer"]),
        (["--seeds=-1"], ["--seeds -1", "integer"]),
        (["--seeds"], ["--seeds", "value"]),
        (["--only", "(td3"], ["--only (td3", "regular expression"]),
        (["--only", "td4"], ["--only td4", "no run"]),
        (["--slurm", "--array=1-3"], ["--array=1-3", "--jobs"]),
        (["--", "a\nb"], ["--"]),
        (["--", "a\rb"], ["--"]),
        (["-a1-3"], ["-a1-3", "unknown option"]),
        (["--slurm", "-D/"], ["-D/", "directory"]),
        (["--dry-run", *TWO, "--", "-n"], ["td3_hyper.py", "-n"]),
        ([*TWO, "--", "--env-kwargs", "{"], ["td3_hyper.py", "--env-kwargs {"]),
        ([*TWO, "--", "--runs-dir", ".", "--exp-name", 300 * "x"], ["xxx", "File name too long"]),
        ([*TWO, "--", "--gama", "1"], ["td3_hyper.py", "--gama"]),
        ([*TWO, "--", "--critic", "mlp"], ["mlp/seed1", "two runs in one directory"]),
        ([*TWO, "--", "--overwrite"], ["--overwrite"]),
        ([*TWO, "--", "--runs-dir", "/dev/null"], ["--runs-dir", "cannot write /dev/null"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_use_is_one_line_and_starts_nothing(folder, args, words):
    finished = benchmark(*args, cwd=folder)
    assert finished.code == 2 and not finished.out
    assert finished.err.startswith("error: ") and finished.err.count("\n") == 1
    for word in words:
        assert word in finished.err
    assert list(folder.iterdir()) == []


def test_a_log_that_cannot_be_written_stops_it_before_anything_starts(folder):
    logs = folder / "runs/logs/td3_hyper/Hopper-v4"
    (logs / "mlp-small").mkdir(parents=True)
    (logs / "mlp-small/seed1.log").symlink_to("nowhere/seed1.log")
    finished = benchmark(*TWO, cwd=folder)
    assert finished.code == 2 and not finished.out
    assert finished.err.endswith("cannot write runs/logs/td3_hyper/Hopper-v4/mlp-small/seed1.log\n")
    assert finished.err.count("\n") == 1 and not (folder / "runs/td3_hyper").exists()


def test_the_445_runs_are_one_array_job_and_what_is_queued_is_not_submitted_again(folder, tmp_path):
    (tmp_path / "bin").mkdir()
    # Job 6 is another's; of job 7, which is submitted here, two tasks are left.
    squeue = f"[[ ! -e '{folder}/job' ]] || printf '%s\\n' '6 1' '7 N/A' '7 1' '7 2'"
    for name, script in (("sbatch", f"cat >'{folder}/job'; echo 7"), ("squeue", squeue)):
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    options = {"cwd": folder, "env": OPTIONS["env"] | {"PATH": f"{tmp_path / 'bin'}:{PATH}"}}
    runs_dir = 200 * "x"  # a table of more than the 64 kB that a pipe holds
    finished = benchmark("--slurm", "--", "--runs-dir", runs_dir, **options)
    assert finished.code == 0 and "submitted 445 tasks as job 7," in finished.out, finished
    tasks = (folder / runs_dir / "logs/slurm/7.tasks").read_text()
    assert tasks.count("\n") == 445 and tasks in (folder / "job").read_text()
    args = ["--only", "td3.*Hopper.*--seed 1", "--slurm", "--", "--runs-dir", runs_dir]
    finished = benchmark(*args, "--save-every", 7, **options)  # the same run directories
    assert "2 in the queue" in finished.out and "submitted 6 tasks" in finished.out, finished


def test_where_slurm_is_missing_the_error_names_what_is(folder, tmp_path):
    path = without("sbatch", folder=tmp_path / "few")
    finished = benchmark("--slurm", cwd=folder, env=OPTIONS["env"] | {"PATH": path})
    assert finished.code == 2 and "Slurm's sbatch is not installed" in finished.err


def test_help_tells_of_every_option(folder):
    finished = benchmark("--help", cwd=folder)
    assert finished.code == 0
    for option in "--dry-run --only --seeds --jobs --smoke --slurm --".split():
        assert f"\n  {option} " in finished.out


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck"):
        subprocess.run(["bash", "-n", BENCHMARK], check=True)
        pytest.skip("no shellcheck here (apt-get install shellcheck): bash -n alone")
    subprocess.run(["shellcheck", BENCHMARK], check=True)


SLURM = ["munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo"]
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ReturnToService=2
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
    path = f"{PATH}:/usr/sbin"
    missing = [name for name in SLURM if not shutil.which(name, path=path)]
    if missing or os.geteuid() != 0:
        lack = ", ".join(missing) or "root"
        pytest.skip(f"no {lack} here: as root, apt-get install slurm-wlm munge")
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
    env = OPTIONS["env"] | {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    munge += ["--force", f"--socket={folder}/munge.socket"]
    daemons = []

    def call(*command: str) -> str:
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        for command in (["munged", "--foreground", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
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


def test_slurm_trains_resumes_what_was_preempted_and_skips_what_is_complete(folder, slurm):
    env, call = slurm
    args = ["--smoke", "--jobs", "1", *TWO, "--slurm", "-p", "low", "--mem=1"]
    args += ["--", "--total-timesteps", "2500", "--eval-every", "1000"]
    finished = benchmark(*args, cwd=folder, env=env)
    assert finished.code == 0 and "submitted 2 tasks as job 1" in finished.out, finished
    run_dirs = [folder / f"smoke/td3_hyper/Hopper-v4/{c}/seed1" for c in CRITICS[:2]]
    wait_until((run_dirs[0] / "checkpoint.pt").exists)
    assert call("squeue", "--noheader", "--array", "--format=%K %t %P") == "2 PD low\n1 R low"
    call("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait_until(lambda: "1 PD" in call("squeue", "--noheader", "--array", "--format=%K %t"))
    assert not (run_dirs[0] / "summary.json").exists()

    finished = benchmark(*args, cwd=folder, env=env)  # all is in the queue
    assert finished.code == 0 and "2 in the queue" in finished.out, finished
    assert "submitted" not in finished.out
    wait_until(lambda: not call("squeue", "--noheader"))
    finished = benchmark(*args, cwd=folder, env=env)
    assert finished.code == 0 and finished.out.startswith("2 runs: 2 complete"), finished

    first, second = (folder / f"smoke/logs/slurm/1_{n}.log" for n in (1, 2))
    end = "complete: smoke/logs/td3_hyper/Hopper-v4/{}/seed1.log\n"
    assert "PREEMPTION" in first.read_text() and first.read_text().endswith(end.format("mlp"))
    assert second.read_text() == end.format("mlp-small")
    log = (folder / "smoke/logs/td3_hyper/Hopper-v4/mlp/seed1.log").read_text()
    assert log.count("starting") == 1 and log.count("resuming") == 1 and "exit code" not in log


def test_what_sbatch_refuses_is_one_line(folder, slurm):
    env, _ = slurm
    finished = benchmark("--smoke", *TWO, "--slurm", "--partition=none", cwd=folder, env=env)
    assert finished.code == 2 and finished.err.count("\n") == 1
    assert finished.err.startswith("error: sbatch: ") and "partition" in finished.err
    args = ["--smoke", *TWO, "--slurm", "--partition=low", "--test-only"]
    finished = benchmark(*args, cwd=folder, env=env)
    assert finished.code == 2 and finished.err.count("\n") == 1
    assert finished.err.startswith("error: sbatch submitted nothing: ")
    assert not list(folder.rglob("*.tasks"))
