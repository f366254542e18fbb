#!/usr/bin/env bash
# Are the meta-updates of a hypernetwork quieter, without the inner step that confounds them? MAML at
# a tenth of the paper's batch.
set -euo pipefail
export OMP_NUM_THREADS=1
for seed in 1 2 3 4 5; do for model in hyper context; do
    python maml_hyper.py --exp-name maml_gradient_noise --env-id HalfCheetahFwdBack-v0 --model $model --num-adapt-steps 0 --seed $seed --num-iterations 150 --num-train-goals 4 --meta-batch-size 4 --num-test-goals 2 --eval-every 5 --save-every 50
done; done
python analysis/gradient_noise.py runs/maml_gradient_noise --out runs/maml_gradient_noise
