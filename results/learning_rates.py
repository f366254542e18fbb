"""How much each critic depends on its learning rate: a dot for each run, a line for the means.

python results/learning_rates.py results/figures/td3_halfcheetah_learning_rate
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
from plot import COLOURS, measure, plt, read

RUNS = Path(__file__).with_name("runs") / "td3_halfcheetah_learning_rate"


def curves_by_rate() -> pd.DataFrame:
    """Critic, learning rate, seed and curve of each run, over the evaluations that all have."""
    table = measure(read((RUNS,)))
    names = [Path(run).parts[-4:] for run in table.index]  # rate, environment, critic, seed
    table = table.assign(critic=[name[2] for name in names], rate=[float(n[0]) for n in names])
    table["seed"] = [int(name[3].removeprefix("seed")) for name in names]
    return table[["critic", "rate", "seed", "curve"]].sort_values(["critic", "rate", "seed"])


def draw_rates(axis, table: pd.DataFrame) -> None:
    """The curve over the learning rate, on a logarithmic axis."""
    for critic, runs in table.groupby("critic"):
        axis.plot(runs.rate, runs.curve, "o", color=COLOURS[critic], alpha=0.4, markeredgewidth=0)
        means = runs.groupby("rate").curve.mean()
        axis.plot(means, color=COLOURS[critic], linewidth=2.4, label=critic)
    rates = sorted(set(table.rate))
    axis.set(xscale="log", xlabel="learning rate of the critic", ylabel="curve to 20,000 steps")
    axis.set_xticks(rates, [f"{rate:.1e}".replace(".0", "").replace("e-0", "e-") for rate in rates])
    axis.minorticks_off()
    axis.legend(frameon=False)


def main(out: Path) -> None:
    table = curves_by_rate()
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "learning_rates.csv", index=False, float_format="%.6g")
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    draw_rates(axis, table)
    title = "TD3 on HalfCheetah: mlp needs a larger rate than the released 3e-4; a dot is a run"
    axis.set_title(title, loc="left")
    figure.savefig(out / "learning_rates.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
