#!/usr/bin/env bash
# Does a hypernetwork generalise further in PEARL? Four more seeds of pearl_models' settings, and
# longer. Fixed before the first run: judged on the test goals after adaptation, by the mean over
# iterations 1 to 150 and over the last tenth.
set -euo pipefail
export OMP_NUM_THREADS=1
for seed in 3 4 5 6; do for model in mlp hyper; do
    python pearl_hyper.py --exp-name pearl_generalisation --env-id HalfCheetahVelMedium-v0 --model $model --seed $seed --num-iterations 150 --num-train-goals 20 --num-test-goals 10 --meta-batch-size 4 --batch-size 64 --context-batch-size 64 --num-initial-steps 400 --num-train-steps 300 --eval-every 5 --checkpoint-every 10 --gamma 0.9 --reward-scale 30 --tau 0.02 --critic-lr 1e-3 --policy-lr 1e-3 --primary-widths 64 128 --dynamic-width 64
done; done
