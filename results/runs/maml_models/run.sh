#!/usr/bin/env bash
# Does a hypernetwork policy do without adaptation? MAML at a tenth of the paper's batch, CPU, commit
# 0cf7540 or before. The policies for gradient_noise.py were trained a second time: hyper seed 2 came
# out the same, bit for bit; context seed 2 and vanilla seed 1 did not, since more samples went
# through the policy at once, but ended alike.
set -euo pipefail
export OMP_NUM_THREADS=1
for seed in 1 2 3; do for model in hyper context vanilla; do
    python maml_hyper.py --exp-name maml_models --env-id HalfCheetahFwdBack-v0 --model $model --seed $seed --num-iterations 150 --num-train-goals 4 --meta-batch-size 4 --num-test-goals 2 --eval-every 5 --save-every 50
done; done
python analysis/gradient_noise.py runs/maml_models/HalfCheetahFwdBack-v0/{hyper/seed1,context/seed1,hyper/seed2,context/seed2,vanilla/seed1} --out runs/maml_models
