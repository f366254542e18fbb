"""Which initialisation of the heads is the default: learning curves and first Q-values.

The runs (about 10 minutes each on 2 cores for HalfCheetah-v4, 2 for Hopper-v4):

    for init in paper small-output released; do for seed in 1 2 3; do
      run="--critic sa-hyper --hyper-init $init --exp-name init_$init --seed $seed
           --total-timesteps 10000 --eval-every 2500"
      python td3_hyper.py --env-id HalfCheetah-v4 $run
      python td3_hyper.py --env-id Hopper-v4 --primary-widths 64 128 256 $run
    done; done

Then `python analysis/hyper_init.py` writes results/hyper_init.csv, a row an evaluation, and
results/hyper_init.png, and prints the first Q-values.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import pandas as pd
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

from hypernet import make_critic  # noqa: E402

INITS = {"released": "#0072b2", "paper": "#d55e00", "small-output": "#009e73"}  # colour-blind safe
WIDTHS = {"HalfCheetah-v4": (256, 512, 1024), "Hopper-v4": (64, 128, 256)}


@dataclass
class Args:
    """Collect the runs into a CSV, a plot and a table."""

    runs_dir: str = "runs"
    """folder of the runs"""
    out: str = "results"
    """folder of hyper_init.csv and hyper_init.png"""


def first_q(env_id: str, init: str, seed: int) -> float:
    """Root mean square of Q(s, a) before learning, on 1,000 steps of random actions."""
    env = gym.make(env_id)
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    batch = []
    for _ in range(1000):
        action = env.action_space.sample()
        batch.append((obs, action))
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            obs, _ = env.reset()
    obs, action = (torch.tensor(np.stack(x), dtype=torch.float32) for x in zip(*batch))
    torch.manual_seed(seed)
    critic = make_critic("sa-hyper", obs.shape[1], action.shape[1], WIDTHS[env_id], init=init)
    with torch.no_grad():
        return critic(obs, action).square().mean().sqrt().item()


def main(args: Args) -> None:
    gym.logger.min_level = gym.logger.ERROR
    rows = []
    for init in INITS:
        for file in sorted(Path(args.runs_dir, f"init_{init}").glob("*/sa-hyper/seed*/eval.csv")):
            if not (file.parent / "summary.json").exists():
                sys.exit(f"{file.parent} is not complete: run its command again first")
            env_id, seed = file.parts[-4], int(file.parts[-2].removeprefix("seed"))
            returns = pd.read_csv(file).groupby("global_step")["return"].mean()
            rows += [(env_id, init, seed, step, value) for step, value in returns.items()]
    if not rows:
        sys.exit(f"no runs in {args.runs_dir}: see --help for the commands")
    table = pd.DataFrame(rows, columns=["env_id", "init", "seed", "global_step", "return"])
    Path(args.out).mkdir(exist_ok=True)
    table.round(2).to_csv(Path(args.out, "hyper_init.csv"), index=False)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, env_id in zip(axes, WIDTHS):
        for init, colour in INITS.items():
            runs = table[(table.env_id == env_id) & (table.init == init)]
            for _, run in runs.groupby("seed"):
                axis.plot(run.global_step, run["return"], color=colour, alpha=0.3, linewidth=1)
            mean = runs.groupby("global_step")["return"].mean()
            axis.plot(mean.index, mean, color=colour, linewidth=2.5, label=init)
        title = f"{env_id}, primary {'-'.join(map(str, WIDTHS[env_id]))}"
        axis.set(title=title, xlabel="environment steps", ylabel="return, mean of 10 episodes")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(title="--hyper-init", frameon=False)
    figure.savefig(Path(args.out, "hyper_init.png"), dpi=110)

    print("| environment | init | seeds | first Q, rms | return at 5,000 | at 10,000 |")
    print("|---|---|---|---|---|---|")
    for env_id in WIDTHS:
        for init in INITS:
            runs = table[(table.env_id == env_id) & (table.init == init)]
            q = np.mean([first_q(env_id, init, seed) for seed in (1, 2, 3)])
            cells = [env_id, init, runs.seed.nunique(), f"{q:.2g}"]
            for step in (5000, 10000):
                values = runs[runs.global_step == step].sort_values("seed")["return"]
                cells.append(f"{values.mean():.0f} ({', '.join(f'{v:.0f}' for v in values)})")
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
