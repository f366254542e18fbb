"""The six panels of the page of results.

python results/overview.py results/figures
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
from plot import COLOURS, curves, dots, plt, read

RUNS = Path(__file__).with_name("runs")


def runs_of(*folders: str, ignore: tuple[str, ...] = ()) -> pd.DataFrame:
    return read(tuple(RUNS / folder for folder in folders), ignore)


def split(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    """Makes a label and a run of each of the column's values."""
    names = ", " + runs[column].astype(str)
    return runs.assign(label=runs.label.astype(str) + names, run=runs.run + names)


def similarity(axis, experiment: str) -> None:
    """Cosine similarity over steps, between chance and the best possible score."""
    table = pd.read_csv(RUNS / experiment / "gradient_accuracy.csv")
    table = table[(table.step > 0) & (table.critic != "as-hyper")]
    of_runs = table.groupby(["critic", "step", "seed"]).cosine_similarity.mean()
    both = of_runs.unstack("critic").dropna()  # the checkpoints that both critics have
    for critic in ("sa-hyper", "mlp"):
        seeds = both[critic].unstack("seed")
        axis.plot(seeds.index / 1e3, seeds, linewidth=0.8, alpha=0.4, color=COLOURS[critic])
        axis.plot(seeds.mean(axis=1).rename(lambda s: s / 1e3), lw=2.4, color=COLOURS[critic])
    best = table.similarity_of_two.mean() ** 0.5
    for y, words in ((0, "chance"), (best, "best\npossible")):
        axis.axhline(y, color="0.5", linewidth=0.8, linestyle="--")
        axis.text(1.01, y, words, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.set(ylim=(-0.45, 1.08), xlabel="environment steps (thousands)")
    axis.set_ylabel("cosine similarity")
    axis.spines[["top", "right"]].set_visible(False)


def main(out: Path) -> None:
    plt.rcParams.update({"font.size": 9, "legend.frameon": False, "axes.titlelocation": "left"})
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    learning_rate, fixed, learning, eight, maml, pearl = axes.flat

    critics = ["5e-5/HalfCheetah-v4/sa-hyper"]
    critics += [f"{rate}/HalfCheetah-v4/mlp" for rate in ("3e-4", "5e-3")]
    fresh = [f"{critic}/seed{seed}" for critic in critics for seed in range(4, 9)]
    curves(learning_rate, runs_of(*(f"td3_halfcheetah_learning_rate/{run}" for run in fresh)))
    learning_rate.legend(loc="upper left", fontsize=8)
    learning_rate.set_title("1  HalfCheetah, fresh seeds: ahead of\nmlp with 3e-4, not with 5e-3")

    dots(eight, runs_of("td3_halfcheetah_critics", ignore=("precision",)))
    names = [text.get_text().replace("critic lr ", "") for text in eight.get_yticklabels()]
    eight.set_yticks(eight.get_yticks(), names)
    eight.set_xlabel("mean return at 2,500 to 20,000 steps")
    eight.set_title("3  HalfCheetah, 1,000 random steps:\nahead of mlp, not shown against d2rl")

    similarity(fixed, "td3_hopper_fixed_policy/paper_primary/hold3")
    fixed.set_title("2  Action gradients, Hopper,\nfixed policy: both learn them")
    for critic in ("sa-hyper", "mlp"):
        fixed.plot([], [], color=COLOURS[critic], linewidth=2.4, label=f"{critic} (3)")
    fixed.legend(loc="center right")

    similarity(learning, "td3_hopper_critics")
    learning.set_title("2  The same, learning actor:\nneither is much above chance")

    runs = runs_of("maml_full_batch")
    curves(maml, split(runs[(runs.split == "test") & (runs.goal != "")], "goal"))
    maml.legend(loc="upper left", ncols=2, fontsize=7, columnspacing=1)
    maml.set(ylim=(-80, 1150), xlabel="iterations (full batch, no inner step)")
    maml.set_title("4  MAML: no difference on average,\nbut in each direction")

    runs = runs_of("pearl_generalisation")
    curves(pearl, split(runs[runs.split == "test"], "phase"))
    pearl.legend(loc="upper left", fontsize=7)
    pearl.set(ylim=(-590, -170), xlabel="iterations (300 updates each)")
    pearl.set_ylabel("return on goals outside training")
    pearl.set_title("6  PEARL, reduced size: likely ahead\nafter adaptation, not before it")

    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "overview.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
