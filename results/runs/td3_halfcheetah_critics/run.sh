#!/usr/bin/env bash
# Which critics learn sooner with the released 1,000 random steps? TD3, HalfCheetah-v4, 20,000 steps.
# three_critics: float32 on a CPU, commit 0cf7540 or before. eight_critics and bfloat16: an NVIDIA
# H200, float32 there is TF32 in matrix products, commit 68343d3; mlp-small float32 on a CPU.
# ten_seeds: float32 on a CPU, commit 6cfe025, seeds 8 to 10 at 2ecdd4d. critic_lr_1e-3: float32 on a
# CPU, commit cbdc89c.
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run VARIANT CRITIC SEED [OPTION ...]
    python td3_hyper.py --runs-dir runs/td3_halfcheetah_critics --exp-name "$1" --env-id HalfCheetah-v4 --critic "$2" --seed "$3" --learning-starts 1000 --total-timesteps 20000 --eval-every 2500 "${@:4}"
}

for seed in 1 2 3; do
    for critic in mlp as-hyper sa-hyper; do run three_critics $critic $seed --save-every 2500; done
    for critic in mlp mlp-large resnet-features resnet35 d2rl as-hyper sa-hyper; do
        run eight_critics $critic $seed --cuda-graph
    done
    run eight_critics mlp-small $seed
    run bfloat16 sa-hyper $seed --cuda-graph --precision bfloat16
    run critic_lr_1e-3 mlp $seed --critic-lr 1e-3
done
for seed in 1 2 3 4 5 6 7 8 9 10; do
    for critic in mlp mlp-small; do run ten_seeds $critic $seed; done
done
python analysis/gradient_accuracy.py runs/td3_halfcheetah_critics/three_critics --out runs/td3_halfcheetah_critics/three_critics
