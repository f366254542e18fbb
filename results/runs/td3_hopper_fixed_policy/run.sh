#!/usr/bin/env bash
# Are the action gradients better for a policy that stays as it is? TD3, Hopper-v4, --actor-lr 0,
# float32 on a CPU, no eval.csv kept, since the return of a fixed policy does not change. mlp and
# small_primary: commit 756ad83, the paper's sa-hyper 7b011d9. Planned were 20,000 steps of each;
# both sa-hyper were stopped at 10,000, for lack of time.
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run VARIANT CRITIC SEED [OPTION ...]
    python td3_hyper.py --runs-dir runs/td3_hopper_fixed_policy --exp-name "$1" --env-id Hopper-v4 --critic "$2" --seed "$3" --actor-lr 0 --total-timesteps 20000 --save-every 2500 "${@:4}"
}

for seed in 1 2 3; do
    run paper_primary mlp $seed
    run paper_primary sa-hyper $seed
    run small_primary sa-hyper $seed --primary-widths 64 128 256
done
for hold in 3 1; do for out in runs/td3_hopper_fixed_policy/{paper,small}_primary; do
    python analysis/gradient_accuracy.py "$out" --repeat --hold $hold --out "$out/hold$hold"
done; done
