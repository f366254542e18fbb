#!/usr/bin/env bash
# Does an inner step help a hypernetwork policy at a rate that can do something? MAML at a tenth of
# the paper's batch. Beside maml_models, whose hyper has the released 5e-5.
set -euo pipefail
export OMP_NUM_THREADS=1
for seed in 1 2 3; do for lr in 1e-3 1e-2 0.1; do
    python maml_hyper.py --runs-dir runs/maml_inner_lr --exp-name $lr --env-id HalfCheetahFwdBack-v0 --model hyper --inner-lr $lr --seed $seed --num-iterations 150 --num-train-goals 4 --meta-batch-size 4 --num-test-goals 2 --eval-every 5
done; done
