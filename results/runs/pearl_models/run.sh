#!/usr/bin/env bash
# Does a hypernetwork learn sooner, and generalise further, in PEARL? At a reduced size, whose gamma,
# reward scale, tau and learning rates were chosen by trials of up to 15,000 updates with seed 1 of
# HalfCheetahVel (not kept): with gamma 0.99 and reward scale 5 at rates of 1e-3 and 3e-4, and with
# 0.9 and 5 at doubled default rates, neither model rose above -300 after adaptation; with 0.9 and 30
# mlp did at 1e-3, and hyper more at 1e-3 than at 3e-4. float32: CPU, commit 0cf7540 or before.
# bfloat16: an NVIDIA H200, commit 68343d3, cut off between iterations 95 and 100.
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run VARIANT ENV MODEL SEED [OPTION ...]
    python pearl_hyper.py --runs-dir runs/pearl_models --exp-name "$1" --env-id "$2" --model "$3" --seed "$4" --num-iterations 100 --num-train-goals 20 --num-test-goals 10 --meta-batch-size 4 --batch-size 64 --context-batch-size 64 --num-initial-steps 400 --num-train-steps 300 --eval-every 5 --checkpoint-every 10 --gamma 0.9 --reward-scale 30 --tau 0.02 --critic-lr 1e-3 --policy-lr 1e-3 --primary-widths 64 128 --dynamic-width 64 "${@:5}"
}

for seed in 1 2; do
    for env_id in HalfCheetahVel-v0 HalfCheetahVelMedium-v0; do
        for model in mlp hyper; do run float32 $env_id $model $seed; done
    done
    run bfloat16 HalfCheetahVel-v0 hyper $seed --precision bfloat16 --cuda-graph
done
