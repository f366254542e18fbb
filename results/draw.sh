#!/usr/bin/env bash
# Makes every picture and table in results/figures (or in the folder given) from results/runs.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-results/figures}
runs=results/runs

plot() { # plot NAME TITLE RUNS... [OPTIONS]
    python analysis/plot.py "${@:3}" --out "$out/$1" --title "$2"
}

plot td3_halfcheetah_learning_rate_bfloat16 "TD3 on HalfCheetah, 10,000 random steps: mlp with a learning rate of 1e-3 catches up with sa-hyper after 7,500 updates" $runs/td3_halfcheetah_learning_rate_bfloat16/{released,1e-3,5e-5}
plot td3_halfcheetah_learning_rate "TD3 on HalfCheetah, 10,000 random steps: mlp has its highest mean with 3e-3, ten times the released rate" $runs/td3_halfcheetah_learning_rate/{3e-4,1e-3,2e-3,3e-3,5e-3}/HalfCheetah-v4/mlp $runs/td3_halfcheetah_learning_rate/{3e-4,1e-3}/HalfCheetah-v4/d2rl --dots
plot td3_halfcheetah_fresh_seeds "TD3 on HalfCheetah, five fresh seeds: a lead of sa-hyper over mlp is shown with the released 3e-4 alone" $runs/td3_halfcheetah_learning_rate/{5e-5/HalfCheetah-v4/sa-hyper,{3e-4,1e-3,3e-3,5e-3}/HalfCheetah-v4/mlp}/seed{4..8}
python results/learning_rates.py "$out/td3_halfcheetah_learning_rate"
plot td3_halfcheetah_critics "TD3 on HalfCheetah, 1,000 random steps: sa-hyper is ahead of mlp; d2rl, as-hyper and mlp-large cannot be told from it" $runs/td3_halfcheetah_critics --dots --ignore precision
plot td3_hopper_critics "TD3 on Hopper: the two critics cannot be told apart in the first 10% of the steps" $runs/td3_hopper_critics
plot sac_halfcheetah_random_steps "SAC on HalfCheetah: with 1,000 random steps mlp has not begun to learn; sa-hyper was not run with 10,000" $runs/sac_halfcheetah_random_steps
plot td3_million_steps "TD3 with mlp: 10,000 random steps keep it on its feet on HalfCheetah" $runs/td3_million_steps
plot maml_models "MAML trained with an inner step, a tenth of the batch: it helps context (rate 0.1) and changes nothing for hyper (rate 5e-5)" $runs/maml_models
plot maml_inner_lr "MAML, a tenth of the batch: hyper learns without an inner step, and none of four rates is shown to add to it" $runs/maml_models/HalfCheetahFwdBack-v0/hyper $runs/maml_inner_lr $runs/maml_gradient_noise/HalfCheetahFwdBack-v0/hyper
plot maml_full_batch "MAML at the paper's batch, no inner step: hyper is ahead backward, context forward, not shown on average" $runs/maml_full_batch
plot pearl_models "PEARL, reduced size, two runs of each; on HalfCheetahVelMedium the test goals lie outside training" $runs/pearl_models/float32
plot pearl_generalisation "PEARL, reduced size, four runs of each: after adaptation hyper is likely ahead on goals outside training, not shown on those of training" $runs/pearl_generalisation
plot td3_halfcheetah_initialisation "sa-hyper with three initialisations: released and bias cannot be told apart" $runs/td3_halfcheetah_initialisation/{bias,paper} $runs/td3_halfcheetah_critics/eight_critics/HalfCheetah-v4/sa-hyper
plot maml_initialisation "hyper with three initialisations: the released one learns soonest" $runs/maml_initialisation
plot bfloat16 "sa-hyper in float32 (here TF32) and in bfloat16: whether it loses something cannot be told" $runs/td3_halfcheetah_critics/{eight_critics/HalfCheetah-v4/sa-hyper,bfloat16}
python analysis/gradient_accuracy.py $runs/td3_hopper_fixed_policy/paper_primary/hold3/gradient_accuracy.csv $runs/td3_hopper_critics/gradient_accuracy.csv --out "$out/td3_hopper_gradients" --title "Action gradients on Hopper: both critics learn them under a fixed policy, neither is much above chance with a learning actor"
python analysis/gradient_noise.py $runs/maml_gradient_noise/gradient_noise.csv --out "$out/maml_gradient_noise" --title "Spread of 50 independent updates, trained without an inner step: hyper spreads more than context"
python analysis/gradient_noise.py $runs/maml_models/gradient_noise.csv --out "$out/maml_models" --title "Spread of 50 independent updates: hyper spreads more than context before the inner step, less after it"
python results/overview.py "$out"
