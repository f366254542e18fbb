#!/usr/bin/env bash
# How much does each critic depend on its learning rate, and who learns sooner if each has its best?
# TD3, HalfCheetah-v4, 10,000 random steps, float32, one thread a run. Commit 18548ad.
#
# Fixed before the first run: each critic's best rate is the one with the highest mean return over
# the evaluations from 12,500 to 20,000 steps, averaged over seeds 1 to 3. sa-hyper and mlp are then
# compared at their best rates on the fresh seeds 4 to 8 alone, by the mean return over the
# evaluations from 12,500 to 30,000 steps.
#
# Added when mlp had been run with four rates, of which the largest was best, and before sa-hyper was
# run on fresh seeds: mlp with 5e-3. The rule is the same for its five rates.
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # run CRITIC LEARNING_RATE SEED STEPS
    python td3_hyper.py --runs-dir runs/td3_halfcheetah_learning_rate --exp-name "$2" --env-id HalfCheetah-v4 --critic "$1" --critic-lr "$2" --seed "$3" --total-timesteps "$4" --eval-every 2500
}

for seed in 1 2 3 4 5 6 7 8 9 10; do
    for lr in 3e-4 1e-3 2e-3 3e-3; do run mlp $lr $seed 30000; done
    for lr in 3e-4 1e-3; do run d2rl $lr $seed 30000; done
done
for seed in 1 2 3; do
    for lr in 2.5e-5 5e-5 1e-4 2e-4; do run sa-hyper $lr $seed 20000; done
done
for seed in 1 2 3 4 5 6 7 8 9 10; do run mlp 5e-3 $seed 30000; done

# The rule chose 5e-5 for sa-hyper, before this line was run.
for seed in 4 5 6 7 8; do run sa-hyper 5e-5 $seed 30000; done
