#!/usr/bin/env bash
# Does hyper beat context with the inner step at the full batch? MAML, beside maml_full_batch.
set -euo pipefail
export OMP_NUM_THREADS=2
for seed in 1 2 3; do
    python maml_hyper.py --exp-name maml_full_batch_inner_step --env-id HalfCheetahFwdBack-v0 --model context --seed $seed --num-iterations 100 --num-test-goals 4 --eval-every 10
done
