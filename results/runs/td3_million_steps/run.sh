#!/usr/bin/env bash
# Does the baseline match published scores? TD3 with mlp, a million steps, float32 on a CPU, commit
# 756ad83. Hopper-v4's default is 1,000 random steps.
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run RANDOM_STEPS ENV SEED [OPTION ...]
    python td3_hyper.py --runs-dir runs/td3_million_steps --exp-name "$1_random_steps" --env-id "$2" --critic mlp --seed "$3" --learning-starts "$1" "${@:4}"
}

for seed in 1 2; do
    run 1000 Hopper-v4 $seed --save-every 50000
    run 10000 HalfCheetah-v4 $seed
done
run 1000 HalfCheetah-v4 1
run 1000 HalfCheetah-v4 2 --total-timesteps 100000 # it had fallen on its back
# When Hopper's runs had done 200,000 steps:
python analysis/gradient_accuracy.py runs/td3_million_steps/1000_random_steps/Hopper-v4 --repeat --out runs/td3_million_steps/1000_random_steps
