#!/usr/bin/env bash
# Does a hypernetwork critic learn sooner on Hopper-v4, and are its action gradients better? TD3, the
# paper's networks, 100,000 steps, bfloat16 on a CPU. Commit 7b011d9, seeds 2 and 3 of sa-hyper
# cbdc89c (the same code). mlp had one thread, sa-hyper two, but seed 1 one up to step 60,623.
set -euo pipefail
for critic in mlp sa-hyper; do for seed in 1 2 3; do
    python td3_hyper.py --exp-name td3_hopper_critics --env-id Hopper-v4 --critic $critic --seed $seed --total-timesteps 100000 --save-every 10000 --precision bfloat16
done; done
python analysis/gradient_accuracy.py runs/td3_hopper_critics --repeat --out runs/td3_hopper_critics
