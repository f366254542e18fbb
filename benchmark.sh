#!/usr/bin/env bash
# usage: ./benchmark.sh [--dry-run] [--only REGEX] [--seeds N] [--jobs N] [--smoke]
#                       [--slurm [SBATCH OPTION...]] [-- ARGUMENT...]
# Trains the paper's matrix: TD3 and SAC on 4 environments with 8 critics, MAML on 5 task families
# with 3 models, PEARL on 5 families with 2 models, 5 seeds each. Stop it at any time and start it
# again: complete runs are skipped, partial ones go on from their last checkpoint.
#   --dry-run     only list the commands with their states (complete, partial, missing) and totals
#   --only REGEX  only commands that match, from `python` to `--seed N`, for example
#                 'td3.*Hopper-v4 --critic (mlp|sa-hyper) '
#   --seeds N     seeds 1 to N (default: 5; 1 with --smoke)
#   --jobs N      how many runs at a time (default: one per core), each with cores / N threads;
#                 with --slurm, how many array tasks at a time (default: no limit)
#   --smoke       shrink every run to seconds, in smoke/ instead of runs/
#   --slurm       submit the runs as one array job. Options that are not among these go to sbatch:
#                 --slurm --gres=gpu:1 --cpus-per-task=2 --time=2-0 --mem=8G
#   --            everything after it goes to each script: -- --device cuda --runs-dir /data/runs
#
# A run that fails is tried once more, unless its exit code is 2 (bad use). What it prints goes to
# seedN.log beside its run directory. Relative paths start at the folder of this script.
# Exit code: 0 if every run is complete (with --slurm: submitted), 1 if not, 2 for bad use.
set -euo pipefail

stop() { echo "error: $*" >&2 && exit 2; }
((BASH_VERSINFO[0] >= 5)) || stop "this needs bash 5, and bash is $BASH_VERSION here"
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")"
self=$PWD/$(basename "${BASH_SOURCE[0]}")
# On Linux, setpriv has the kernel kill a process when its parent is gone, whatever ended that one.
tied=()
! setpriv --pdeathsig KILL true 2>/dev/null || tied=(setpriv --pdeathsig KILL)

# One run, as xargs and a Slurm array task start it: ./benchmark.sh --task RUN_DIR COMMAND
if [[ ${1-} == --task ]]; then
    mkdir -p "$(dirname "$2")"
    [[ ! ${gpu_slot-} ]] || export CUDA_VISIBLE_DEVICES=$((gpu_slot % gpus))
    for _ in 1 2; do
        echo "+ $3" >>"$2.log"
        eval "${tied[*]} $3" >>"$2.log" 2>&1 </dev/null && echo "complete: $2" && exit
        code=$?
        echo "failed with exit code $code, see $2.log: $(tail -n 1 "$2.log")"
        ((code != 2)) || break
    done
    exit 1
fi

dry_run='' only='' seeds='' jobs='' smoke='' slurm='' sbatch=(sbatch) runs_dir=runs
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
    --help | -h) sed -nE '/^# usage/,/^set/ s/^# ?//p' "$self" && exit ;;
    --dry-run) dry_run=1 ;;
    --smoke) smoke=1 runs_dir=smoke ;;
    --slurm) slurm=1 ;;
    --only | --seeds | --jobs)
        (($# > 1)) || stop "$1 needs a value (see --help)"
        [[ $1 == --only || $2 =~ ^[1-9][0-9]{0,3}$ ]] || stop "$1 $2: not an integer from 1 to 9999"
        declare "${1#--}=$2" && shift
        ;;
    *) [[ $slurm ]] || stop "$1: unknown option (see --help)" && sbatch+=("$1") ;;
    esac
    shift
done

# What follows -- can decide where the runs are, and that complete ones are to be made longer.
exp_name='' suffix='' longer='' extra='' option='' device=''
for word in "${@:2}"; do
    extra+=" $(printf %q "$word")"
    [[ $word != --*=* ]] || { option=${word%%=*} && word=${word#*=}; }
    case ${option//_/-} in
    --runs-dir) runs_dir=${word/#\~\//$HOME/} ;;
    --device) device=$word ;;
    --exp-name) exp_name=$word ;;
    --context) suffix=-$word ;;
    --total-timesteps | --num-iterations) longer=1 ;;
    --seed | --env-id | --critic | --model) stop "$option: the matrix sets it; use --only, --seeds" ;;
    esac
    option=$word
done

declare -A small=() # arguments that shrink a run (smoke is 1, which is also its number of seeds)
if [[ $smoke ]]; then
    few=' --runs-dir smoke --eval-episodes 1 --primary-widths 8 16 --dynamic-width 8'
    small[td3]="$few --total-timesteps 120 --learning-starts 80 --eval-every 60 --batch-size 16"
    small[sac]=${small[td3]}
    few+=' --num-iterations 2 --num-train-goals 2 --num-test-goals 2 --meta-batch-size 2'
    small[maml]="$few --horizon 10 --episodes-per-goal 2"
    small[pearl]="$few --num-initial-steps 20 --num-collect-goals 1 --num-prior-steps 20"
    small[pearl]+=' --num-posterior-steps 20 --num-train-steps 4 --batch-size 8 --horizon 10'
fi
commands=() dirs=()
add() { # algorithm, environment, --critic or --model, its value
    local command="python $1_hyper.py --env-id $2 $3 $4 --seed $seed" kwargs=''
    [[ $command =~ $only ]] || return 0
    [[ $2 != Ant-v4 ]] || kwargs=' ctrl_cost_weight 0.005'
    [[ ! $smoke || $3 != --critic ]] || kwargs+=' max_episode_steps 20'
    commands+=("$command${kwargs:+ --env-kwargs$kwargs}${small[$1]-}$extra")
    dirs+=("$runs_dir/${exp_name:-$1_hyper}/$2/$4${suffix#-learned}/seed$seed")
}
for ((seed = 1; seed <= ${seeds:-${smoke:-5}}; seed++)); do # all of one seed comes first
    for env in Hopper-v4 Walker2d-v4 Ant-v4 HalfCheetah-v4; do
        for critic in mlp mlp-small mlp-large resnet-features resnet35 d2rl as-hyper sa-hyper; do
            for algorithm in td3 sac; do add $algorithm $env --critic $critic; done
        done
    done
    for env in {HalfCheetahFwdBack,AntFwdBack,HalfCheetahVel,AntVel,HalfCheetahVelMedium}-v0; do
        for model in vanilla context hyper; do add maml "$env" --model $model; done
        for model in mlp hyper; do add pearl "$env" --model $model; done
    done
done
((${#dirs[@]})) || stop "--only $only: no command matches this regular expression"
[[ ! $(printf '%s\n' "${dirs[@]}" | sort | uniq -d) ]] ||
    stop "--exp-name $exp_name: two algorithms in one directory; choose one with --only"

look() { # print in which state the runs are, and find out what there is to do
    local i state complete=0 partial=0 missing=0
    todo=()
    for i in "${!dirs[@]}"; do
        if [[ -e ${dirs[i]}/summary.json ]]; then state=complete && ((++complete))
        elif [[ -e ${dirs[i]}/checkpoint.pt ]]; then state=partial && ((++partial))
        else state=missing && ((++missing)); fi
        [[ ! $dry_run ]] || echo "${commands[i]} # $state"
        [[ $state == complete && ! $longer ]] || todo+=("${dirs[i]}" "${commands[i]}")
    done
    echo "${dry_run:+# }${#dirs[@]} runs: $complete complete, $partial partial, $missing missing"
}
look
[[ ! $dry_run && ${#todo[@]} != 0 ]] || exit 0
command -v python >/dev/null || stop 'there is no python here: source .venv/bin/activate'

if [[ $slurm ]]; then
    command -v sbatch >/dev/null || stop '--slurm: there is no sbatch here'
    mkdir -p "$runs_dir/slurm"
    "${sbatch[@]}" --array="0-$((${#todo[@]} / 2 - 1))${jobs:+%$jobs}" <<EOF || exit 2
#!/usr/bin/env bash
#SBATCH --job-name=hypernets --requeue --open-mode=append --output="$runs_dir/slurm/%A_%a.log"
export OMP_NUM_THREADS=\${SLURM_CPUS_PER_TASK:-1}
todo=($(printf '%q ' "${todo[@]}"))
exec bash $(printf %q "$self") --task "\${todo[@]:2*SLURM_ARRAY_TASK_ID:2}"
EOF
    exit
fi

cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
jobs=${jobs:-$cores}
export OMP_NUM_THREADS=$((cores > jobs ? cores / jobs : 1))
slots=()
if [[ ! ${CUDA_VISIBLE_DEVICES+set} && $device != cuda:* ]]; then
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    export gpus # with several, the runs at work at the same time have different ones
    ((gpus < 2)) || slots=(--process-slot-var=gpu_slot)
fi
set -m # xargs and the runs are a process group of their own, which is killed when this script ends
xargs=("${tied[@]}" xargs -0 -n 2 -P "$jobs" "${slots[@]}" "${tied[@]}" bash "$self" --task)
"${xargs[@]}" < <(printf '%s\0' "${todo[@]}") &
group=$! code=0
trap 'kill -KILL -- "-$group"; echo "stopped; run it again to go on" >&2; exit 130' INT TERM HUP
wait $group || code=1
longer='' && look
((${#todo[@]} == 0)) || { code=1 && printf 'not complete, see %s.log: %s\n' "${todo[@]}"; }
exit $code
