#!/usr/bin/env bash
# Does a hypernetwork critic learn sooner with SAC? HalfCheetah-v4, 19,000 and 20,000 updates.
# 1000: an NVIDIA H200, TF32, commit 68343d3. 10000: float32 on a CPU, commit 756ad83.
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run RANDOM_STEPS CRITIC SEED [OPTION ...]
    python sac_hyper.py --runs-dir runs/sac_halfcheetah_random_steps --exp-name "$1" --env-id HalfCheetah-v4 --critic "$2" --seed "$3" --learning-starts "$1" --eval-every 2500 "${@:4}"
}

for seed in 1 2 3; do
    for critic in mlp sa-hyper; do run 1000 $critic $seed --total-timesteps 20000 --cuda-graph; done
    run 10000 mlp $seed --total-timesteps 30000
done
