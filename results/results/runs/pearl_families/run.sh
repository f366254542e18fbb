#!/usr/bin/env bash
# Do the other families learn? PEARL at the size of pearl_models, seed 1. Directions have two tasks.
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run ENV MODEL [OPTION ...]
    python pearl_hyper.py --exp-name pearl_families --env-id "$1" --model "$2" --num-iterations 100 --num-train-goals 20 --num-test-goals 10 --meta-batch-size 4 --batch-size 64 --context-batch-size 64 --num-initial-steps 400 --num-train-steps 300 --eval-every 5 --checkpoint-every 10 --gamma 0.9 --reward-scale 30 --tau 0.02 --critic-lr 1e-3 --policy-lr 1e-3 --primary-widths 64 128 --dynamic-width 64 "${@:3}"
}

for env_id in AntFwdBack-v0 HalfCheetahFwdBack-v0; do
    for model in mlp hyper; do run $env_id $model --num-train-goals 2 --num-test-goals 2; done
done
run HalfCheetahVel-v0 hyper --context oracle
