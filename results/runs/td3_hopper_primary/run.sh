#!/usr/bin/env bash
# The same with a smaller primary network, float32 on a CPU. 20000_steps: commit 0cf7540 or before;
# 40000_steps: commit 756ad83, where sa-hyper was planned for 100,000 steps and stopped at 40,000.
# gradient_reliability.csv was made by a script of that commit; --repeat does the same today.
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run STEPS CRITIC SEED [OPTION ...]
    python td3_hyper.py --runs-dir runs/td3_hopper_primary --exp-name "$1_steps" --env-id Hopper-v4 --critic "$2" --seed "$3" --primary-widths 64 128 256 --total-timesteps "$1" "${@:4}"
}

for seed in 1 2 3; do for critic in mlp as-hyper sa-hyper; do
    run 20000 $critic $seed --eval-every 2500 --save-every 2500
done; done
for seed in 1 2; do for critic in mlp sa-hyper; do
    run 40000 $critic $seed --save-every 10000
done; done
for out in runs/td3_hopper_primary/*_steps; do
    python analysis/gradient_accuracy.py "$out" --repeat --out "$out"
done
