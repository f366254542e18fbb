#!/usr/bin/env bash
# Does a hypernetwork critic learn sooner with SAC and the default 10,000 random steps?
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run LEARNING_RATE CRITIC SEED
    python sac_hyper.py --runs-dir runs/sac_halfcheetah_learning_rate --exp-name "$1" --env-id HalfCheetah-v4 --critic "$2" --critic-lr "$1" --seed "$3" --total-timesteps 20000 --eval-every 2500
}

for seed in 1 2 3 4 5; do for lr in 3e-4 1e-3; do run $lr mlp $seed; done; done
for seed in 1 2 3; do run 5e-5 sa-hyper $seed; done
