#!/usr/bin/env bash
# The critics' learning rates, first runs. TD3, HalfCheetah-v4, 10,000 random steps, bfloat16, on a
# CPU. released: commit 756ad83, the others cbdc89c.
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run VARIANT CRITIC SEED [OPTION ...]
    python td3_hyper.py --runs-dir runs/td3_halfcheetah_learning_rate_bfloat16 --exp-name "$1" --env-id HalfCheetah-v4 --critic "$2" --seed "$3" --learning-starts 10000 --total-timesteps 30000 --eval-every 2500 --precision bfloat16 "${@:4}"
}

for seed in 1 2 3; do
    for critic in mlp sa-hyper; do run released $critic $seed; done
    for lr in 5e-5 1e-3; do run $lr mlp $seed --critic-lr $lr; done
done
run 3e-4 sa-hyper 1 --critic-lr 3e-4 # stopped after 20,000 steps
