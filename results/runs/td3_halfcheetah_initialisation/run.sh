#!/usr/bin/env bash
# How should a hypernetwork critic start? TD3, HalfCheetah-v4, 1,000 random steps, 10,000 steps, an
# NVIDIA H200, TF32, commit 68343d3. The runs with the released initialisation are the first half of
# those in td3_halfcheetah_critics/eight_critics.
set -euo pipefail

run() { # run VARIANT INIT SEED [OPTION ...]
    python td3_hyper.py --runs-dir runs/td3_halfcheetah_initialisation --exp-name "$1" --env-id HalfCheetah-v4 --critic sa-hyper --hyper-init "$2" --seed "$3" --learning-starts 1000 --total-timesteps 10000 --eval-every 2500 --cuda-graph "${@:4}"
}

for init in bias paper; do for seed in 1 2 3; do run $init $init $seed; done; done
for lr in 1.5e-5 1.5e-4; do run bias_critic_lr_$lr bias 1 --critic-lr $lr; done
