#!/usr/bin/env bash
# The paper's 445 runs, on this machine or on a Slurm cluster: ./benchmark.sh --help
set -euo pipefail

usage() {
    cat <<'EOF'
usage: ./benchmark.sh [--dry-run] [--only REGEX] [--seeds N] [--jobs N] [--smoke]
                      [--slurm [SBATCH OPTION...]] [-- ARGUMENT...]

Trains what is not complete of the paper's matrix: TD3 and SAC on 4 environments with 8 critics,
MAML on 5 families of tasks with 3 models, PEARL on 5 families with 2 models, 5 seeds each. Stop it
as you like and start it again: complete runs are skipped, partial ones go on from their checkpoint.

  --dry-run     list the runs, each a command with its state as a comment, and the totals
  --only REGEX  only runs whose command, from `python` to `--seed N`, matches, for example
                'td3.*Hopper-v4 --critic (mlp|sa-hyper) '
  --seeds N     seeds 1 to N (default: 5; 1 with --smoke)
  --jobs N      runs at a time, each with cores / N threads (default: as many as there are cores,
                with one thread each); with --slurm array tasks at a time (default: no limit)
  --smoke       every run in seconds, with small networks, in smoke/, not runs/
  --slurm       submit one array job in place of training here; options that are not among these
                are sbatch's: --slurm --partition=gpu --gres=gpu:1 --cpus-per-task=2 --time=2-0
                --mem=8G. A preempted task is requeued and goes on from its checkpoint. What an
                earlier submission still has in the queue is left to it
  --            what follows goes to each script: -- --device cuda --runs-dir /data/runs

States: complete; partial; failed, if this script tried it in vain; not started; other arguments, if
the run directory holds a run with others, or without a config.json that can be read: it is left
alone. A run that fails is tried once more, unless its exit code is 2, bad use, which would come
again. A run has a log, RUNS_DIR/logs/EXP_NAME/.../seedN.log.
Exit code: 0, all are complete (--slurm: submitted); 1, some run is not; 2, bad use.
EOF
}

stop() { # what was wrong, in one line
    echo "error: $(printf %s "$*" | tr -s '[:space:]' ' ')" >&2
    exit 2
}

((BASH_VERSINFO[0] >= 5)) || stop "bash $BASH_VERSION is too old, this needs bash 5"
self=$(realpath "${BASH_SOURCE[0]}")
guard=() # no trap sees SIGKILL: where setpriv can, a run has the kernel end it with its parent
! setpriv --pdeathsig KILL true 2>/dev/null || guard=(setpriv --pdeathsig KILL)

# One run, on this machine and as a task of Slurm alike. The log's last line is the outcome.
train() { # log, command
    local log=$1 command=$2 child code
    # Stopped from outside is no failure.
    trap 'kill -KILL "$child" 2>/dev/null || true; exit 143' INT TERM HUP
    for _ in 1 2; do
        echo "+ $command" >>"$log"
        eval "exec ${guard[*]} $command" >>"$log" 2>&1 </dev/null &
        child=$! code=0
        wait "$child" || code=$?
        [[ ! $(tail -c 1 "$log") ]] || echo >>"$log" # the outcome has a line of its own
        if ((code == 0)); then
            echo complete >>"$log"
            echo "complete: $log"
            return
        fi
        echo "exit code $code: $log: $(tail -n 1 "$log")"
        ((code != 2)) || break
    done
    # What another process trains has not failed.
    [[ $(tail -n 1 "$log") == *"another process"* ]] || echo "failed: exit code $code" >>"$log"
    return 1
}

if [[ ${1-} == --task ]]; then
    train "$2" "$3"
    exit
fi

dry_run='' only='.' seeds='' jobs='' smoke='' slurm='' sbatch_options=() extra=()
while (($#)); do
    case $1 in
    --help | -h) usage && exit ;;
    --dry-run) dry_run=yes ;;
    --smoke) smoke=yes ;;
    --slurm) slurm=yes ;;
    --only=* | --seeds=* | --jobs=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
    --only | --seeds | --jobs)
        (($# > 1)) || stop "$1 needs a value (./benchmark.sh --help)"
        [[ $1 == --only || $2 =~ ^[1-9][0-9]{0,3}$ ]] || stop "$1 $2: must be an integer, 1 to 9999"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    --)
        extra=("${@:2}")
        break
        ;;
    *)
        [[ $slurm ]] || stop "$1: unknown option (./benchmark.sh --help)"
        [[ $1 != @(-a*|--array*|-D*|--chdir*|-W|--wait) ]] ||
            stop "$1: array (--jobs N limits it), directory and not to wait are this script's"
        sbatch_options+=("$1")
        ;;
    esac
    shift
done
[[ ${extra[*]} != *[[:cntrl:]]* ]] || stop "arguments after -- must have no control characters"
{ [[ "" =~ $only ]]; } 2>/dev/null || (($? == 1)) || stop "--only $only: not a regular expression"
for name in sbatch squeue; do
    [[ ! $slurm || $dry_run ]] || command -v $name >/dev/null ||
        stop "--slurm: Slurm's $name is not installed here (Debian: apt-get install slurm-client)"
done
seeds=${seeds:-$([[ $smoke ]] && echo 1 || echo 5)}

quote() { # one word, as a shell and Python's shlex read it
    local word=$1
    [[ $word =~ ^[[:alnum:]_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    printf '%s\n' "$word" # echo would take -n for its own
}

# The matrix, a command a line, seed by seed: the first fifth of the runs is all of it with one.
list() {
    local folder more='' word seed algorithm env kwargs critic family model
    local critics=(mlp mlp-small mlp-large resnet-features resnet35 d2rl as-hyper sa-hyper)
    local -A small=()
    local tiny=' --runs-dir smoke --eval-episodes 1 --primary-widths 8 16 --dynamic-width 8'
    if [[ $smoke ]]; then
        small[td3]="$tiny --total-timesteps 120 --learning-starts 80 --eval-every 60"
        small[td3]+=" --checkpoint-every 20 --batch-size 16 --buffer-size 1000"
        small[sac]=${small[td3]}
        tiny+=' --num-iterations 2 --num-train-goals 2 --num-test-goals 2 --meta-batch-size 2'
        small[maml]="$tiny --horizon 10 --episodes-per-goal 2 --checkpoint-every 1"
        small[pearl]="$tiny --horizon 10 --num-initial-steps 20 --num-collect-goals 1"
        small[pearl]+=" --num-prior-steps 20 --num-posterior-steps 20 --num-train-steps 4"
        small[pearl]+=" --batch-size 8 --context-batch-size 8 --buffer-size 1000"
    fi
    folder=${self%/*}/
    [[ $folder != "$(pwd -P)/" ]] || folder=''
    for word in "${extra[@]}"; do more+=" $(quote "$word")"; done
    one() { # algorithm, arguments
        [[ "python $1_hyper.py $2 --seed $seed" =~ $only ]] || return 0
        echo "python $(quote "$folder$1_hyper.py") $2 --seed $seed${small[$1]-}$more"
    }
    for ((seed = 1; seed <= seeds; seed++)); do
        for algorithm in td3 sac; do
            for env in Hopper-v4 Walker2d-v4 Ant-v4 HalfCheetah-v4; do
                kwargs=''
                [[ $env != Ant-v4 ]] || kwargs='"ctrl_cost_weight": 0.005'
                [[ ! $smoke ]] || kwargs+="${kwargs:+, }\"max_episode_steps\": 20"
                [[ ! $kwargs ]] || kwargs=" --env-kwargs '{$kwargs}'"
                for critic in "${critics[@]}"; do
                    one $algorithm "--env-id $env$kwargs --critic $critic"
                done
            done
        done
        for family in HalfCheetahFwdBack AntFwdBack HalfCheetahVel AntVel HalfCheetahVelMedium; do
            for model in vanilla context hyper; do one maml "--env-id $family-v0 --model $model"; done
            for model in mlp hyper; do one pearl "--env-id $family-v0 --model $model"; done
        done
    done
}

# Reads commands, writes for each its state and log. The scripts' own parsers tell what a command
# means, so that bad arguments end here, before anything starts.
states='
import contextlib, importlib, io, json, shlex, sys
from pathlib import Path

def stop(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def state(run_dir, args, free, log):
    log = log.read_text(errors="replace").splitlines() if log.exists() else []
    begun = "failed" if log and log[-1].startswith("failed") else ""
    if not (run_dir / "config.json").exists() and not any(run_dir.glob("checkpoint*.pt")):
        return begun or "not started"
    total = "total_timesteps" if "total_timesteps" in args else "num_iterations"
    try:
        old = json.loads((run_dir / "config.json").read_text())["args"]
        extended = old[total] < args[total]
    except (OSError, ValueError, KeyError, TypeError):
        return "other arguments"
    complete = (run_dir / "summary.json").exists() and not extended
    differ = {name for name in args if old.get(name) != args[name]} - free
    if differ - {total if extended else "", "device" if complete else ""}:
        return "other arguments"
    return "complete" if complete else begun or "partial"

elsewhere, directories = sys.argv[1], set()
for command in sys.stdin:
    _, file, *words = shlex.split(command)
    name = Path(file).name
    sys.path[0], sys.argv = str(Path(file).parent), [file, *words]
    try:
        script = importlib.import_module(name.removesuffix(".py"))
    except ImportError as error:
        stop(f"{name}: {error}; run in its environment: source .venv/bin/activate")
    if elsewhere:
        script.torch.cuda.is_available = lambda: True  # where it runs, if not here
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            args = vars(script.parse_args())
        dict(json.loads(args.get("env_kwargs", "{}")))
    except SystemExit as end:
        message = output.getvalue().strip() if end.code else "--help trains nothing"
        stop(f"{name}: " + message.removeprefix("error: "))
    except (ValueError, TypeError):
        stop(f"{name}: --env-kwargs " + args["env_kwargs"] + ": must be a JSON object")
    args = json.loads(json.dumps(args))
    model = args.get("critic") or args["model"]
    if args.get("context", "learned") != "learned":
        model += "-" + args["context"]
    run = Path(args["exp_name"], args["env_id"], model, "seed%d" % args["seed"])
    run_dir, log = Path(args["runs_dir"], run), Path(args["runs_dir"], "logs", f"{run}.log")
    if args["overwrite"]:
        stop("--overwrite: would start afresh at every start; remove the run directories instead")
    if run_dir in directories:
        stop(f"{run_dir}: two runs in one directory; the matrix sets environment, model and seed")
    directories.add(run_dir)
    slurm = Path(args["runs_dir"], "logs", "slurm")
    # Without --device, the machine that runs it has the say.
    free = {*script.FREE_ARGS, "" if " --device" in command else "device"}
    try:
        print(state(run_dir, args, free, log), log, slurm, sep="\t")
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}")
'

command -v python >/dev/null || stop "no python here: source .venv/bin/activate"
mapfile -t commands < <(list)
((${#commands[@]})) || stop "--only $only: matches no run"
table=$(printf '%s\n' "${commands[@]}" |
    PYTHONDONTWRITEBYTECODE=1 python -c "$states" "$slurm$dry_run") || exit 2
mapfile -t state < <(cut -f 1 <<<"$table")
mapfile -t log < <(cut -f 2 <<<"$table")

total() {
    local name
    local -A count=()
    for name in "${state[@]}"; do count[$name]=$((${count[$name]-0} + 1)); done
    printf '%d runs: ' "${#state[@]}"
    for name in complete partial failed 'not started'; do printf '%d %s, ' "${count[$name]-0}" "$name"; done
    echo "${count["other arguments"]-0} other arguments"
}

todo=() code=0
for i in "${!commands[@]}"; do
    case ${state[i]} in
    complete) ;;
    'other arguments') code=1 ;; # the script would refuse it
    *) todo+=("$i") ;;
    esac
    [[ ! $dry_run ]] || echo "${commands[i]} # ${state[i]}"
done
if [[ $dry_run ]]; then
    echo "# $(total)"
    exit
fi
if [[ $slurm ]]; then
    queue=$(squeue --me --noheader --array --format='%F %K' 2>&1) || stop "squeue: $queue"
fi
for i in "${todo[@]}"; do
    { mkdir -p "${log[i]%/*}" && : >>"${log[i]}"; } 2>/dev/null ||
        stop "--runs-dir: cannot write ${log[i]}"
done

if [[ $slurm ]]; then
    folder=$(head -n 1 <<<"$table" | cut -f 3)
    mkdir -p "$folder"
    # Pending and running tasks of earlier submissions, whose lists are in this folder.
    declare -A queued=()
    while read -r job task; do
        [[ $task =~ ^[0-9]+$ && -e $folder/$job.tasks ]] || continue
        task=$(sed -n "${task}p" "$folder/$job.tasks")
        queued[${task%%$'\t'*}]=yes
    done <<<"$queue"
    tasks=()
    for i in "${todo[@]}"; do
        task="${log[i]}"$'\t'"${commands[i]}"
        [[ ${queued[${log[i]}]-} ]] || tasks+=("$task")
    done
    echo "$(total), $((${#todo[@]} - ${#tasks[@]})) in the queue"
    ((${#tasks[@]})) || exit "$code"
    script=$(
        cat <<EOF
#!/usr/bin/env bash
export OMP_NUM_THREADS=\${SLURM_CPUS_PER_TASK:-1}
IFS=\$'\t' read -r log command < <(sed -n "\${SLURM_ARRAY_TASK_ID}p" <<'TASKS'
$(printf '%s\n' "${tasks[@]}")
TASKS
)
exec bash $(quote "$self") --task "\$log" "\$command"
EOF
    )
    answer=$(sbatch --job-name=hypernets --output="${folder//%/%%}/%A_%a.log" \
        "${sbatch_options[@]}" --parsable --requeue --open-mode=append \
        --array="1-${#tasks[@]}${jobs:+%$jobs}" <<<"$script" 2>&1) || stop "sbatch: $answer"
    job=$(sed -n 's/^\([0-9]\+\).*/\1/p' <<<"$answer" | tail -n 1)
    [[ $job ]] || stop "sbatch submitted nothing: $answer"
    printf '%s\n' "${tasks[@]}" >"$folder/$job.tasks"
    echo "submitted ${#tasks[@]} tasks as job $job, logs in $folder: squeue -j $job"
    exit "$code"
fi

cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
jobs=${jobs:-$cores}
export OMP_NUM_THREADS=$((cores > jobs ? cores / jobs : 1))
echo "$(total); $jobs at a time, threads each: $OMP_NUM_THREADS"
set -m # each run in a process group of its own, to be killed as a whole
trap 'for group in $(jobs -p); do kill -KILL -- "-$group" 2>/dev/null || true; done' EXIT
trap 'echo "interrupted: the same command goes on from here" >&2; exit 130' INT
trap 'exit 143' TERM HUP
started=0 group=''
for i in "${todo[@]}"; do
    while (($(jobs -pr | wc -l) >= jobs)); do wait -n || true; done
    echo "start $((++started))/${#todo[@]}: ${log[i]}"
    date '+start: %F %T' >>"${log[i]}" # so that its last line is no earlier outcome
    "${guard[@]}" bash "$self" --task "${log[i]}" "${commands[i]}" </dev/null &
done
wait

for i in "${todo[@]}"; do
    case $(tail -n 1 "${log[i]}") in
    complete) state[i]=complete ;;
    failed*) state[i]=failed ;;
    *) state[i]=partial ;; # in the hands of another process
    esac
done
total
for i in "${!commands[@]}"; do
    [[ ${state[i]} == complete ]] || { code=1 && echo "${state[i]}: ${commands[i]} # ${log[i]}"; }
done
exit "$code"
