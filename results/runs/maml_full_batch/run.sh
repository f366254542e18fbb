#!/usr/bin/env bash
# Does a hypernetwork policy learn more than one that is told the task? MAML at the paper's batch and
# length, without an inner step, CPU. Seed 1: commit b84876e, seeds 2 and 3: 2ecdd4d. One thread a
# run, two for seed 2 of hyper.
set -euo pipefail
export OMP_NUM_THREADS=1
for seed in 1 2 3; do for model in hyper context; do
    python maml_hyper.py --exp-name maml_full_batch --env-id HalfCheetahFwdBack-v0 --model $model --seed $seed --num-adapt-steps 0 --num-test-goals 4 --eval-every 10
done; done
