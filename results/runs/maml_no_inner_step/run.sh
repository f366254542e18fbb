#!/usr/bin/env bash
# MAML at a tenth of the paper's batch without an inner step, CPU, commit 0cf7540 or before. Planned
# were three seeds of each model; hyper was stopped at iteration 110, the others were not started.
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run VARIANT MODEL ITERATIONS [OPTION ...]
    python maml_hyper.py --runs-dir runs/maml_no_inner_step --exp-name "$1" --model "$2" --num-iterations "$3" --env-id HalfCheetahFwdBack-v0 --num-adapt-steps 0 --num-train-goals 4 --meta-batch-size 4 --num-test-goals 2 --eval-every 5 "${@:4}"
}

for model in context hyper; do run released $model 150; done
run gamma_0.99 hyper 100 --gamma 0.99
run init_paper hyper 100 --hyper-init paper
