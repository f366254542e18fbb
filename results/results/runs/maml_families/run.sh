#!/usr/bin/env bash
# Do the other families learn? MAML, velocities at a tenth of the paper's batch, the ants at the full
# one without an inner step.
set -euo pipefail
export OMP_NUM_THREADS=1
for seed in 1 2; do for env_id in HalfCheetahVel-v0 HalfCheetahVelMedium-v0; do
    for model in vanilla context hyper; do
        python maml_hyper.py --exp-name maml_families --env-id $env_id --model $model --seed $seed --num-iterations 150 --num-train-goals 4 --meta-batch-size 4 --num-test-goals 4 --eval-every 5
    done
done; done
for env_id in AntFwdBack-v0 AntVel-v0; do for model in hyper context; do
    python maml_hyper.py --exp-name maml_families --env-id $env_id --model $model --num-adapt-steps 0 --num-iterations 100 --num-test-goals 4 --eval-every 5
done; done
