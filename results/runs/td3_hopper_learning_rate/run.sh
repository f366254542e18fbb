#!/usr/bin/env bash
# Does a hypernetwork critic learn sooner on Hopper? TD3, 100,000 steps. Seeds 1 to 3 of mlp with
# 3e-4 are in td3_hopper_critics, in bfloat16. sa-hyper follows at its best rate in
# td3_halfcheetah_learning_rate, seeds 1 to 3.
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run LEARNING_RATE CRITIC SEED
    python td3_hyper.py --runs-dir runs/td3_hopper_learning_rate --exp-name "$1" --env-id Hopper-v4 --critic "$2" --critic-lr "$1" --seed "$3" --total-timesteps 100000
}

for seed in 4 5 6 7 8 9 10; do run 3e-4 mlp $seed; done
for seed in 1 2 3 4 5 6 7 8 9 10; do run 1e-3 mlp $seed; done
