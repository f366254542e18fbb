#!/usr/bin/env bash
# How should a hypernetwork policy start? MAML at a tenth of the paper's batch, without an inner step,
# CPU, commit 68343d3 or before.
set -euo pipefail
export OMP_NUM_THREADS=1
for init in released bias paper; do for seed in 1 2 3; do
    python maml_hyper.py --runs-dir runs/maml_initialisation --exp-name $init --env-id HalfCheetahFwdBack-v0 --model hyper --hyper-init $init --seed $seed --num-adapt-steps 0 --num-iterations 100 --num-train-goals 4 --meta-batch-size 4 --num-test-goals 2 --eval-every 5
done; done
