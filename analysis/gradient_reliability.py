"""How far the "true" gradient of gradient_accuracy.py can be trusted, in runs of td3_hyper.py.

    python analysis/gradient_reliability.py runs/td3_hyper

A similarity near 0 has two readings: the critic's gradient is wrong, or the estimate that it is
compared with is noise. Here each state of a run's last step_N.pt gets two independent estimates of
the gradient, of N rollouts each, and their cosine similarity is a measure of the second: no critic
can be told from another where two estimates of one and the same gradient disagree.

Writes gradient_reliability.csv, a row a state and N, with the similarity of the two estimates, and
of the first one and the critic's gradient, after each run; prints their means. Empty where a
gradient is exactly 0. The same command again measures only the runs that the table lacks.
"""

import argparse
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from gradient_accuracy import (
    copy_checked,
    cosine_similarity,
    critic_gradient,
    estimate_gradient,
    find_runs,
    load_agent,
    make_envs,
    read_table,
    rollouts,
    sample_states,
    saved_steps,
)
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import td3_hyper  # noqa: E402
from td3_hyper import stop  # noqa: E402

RUN = ["env_id", "critic", "seed"]
SIMILARITIES = ["similarity_of_two", "cosine_similarity"]
SETTINGS = ["num_states", "hold", "exp_name"]  # the same in every row of a table
COLUMNS = [*RUN, "step", "state", "num_actions", *SIMILARITIES, *SETTINGS]


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = stop  # in one line
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run directories of td3_hyper.py, or folders of them")
    add("--out", type=Path, default="plots", help="folder of the table: %(default)s")
    add("--num-states", type=int, default=15, help="states a run: 15 (paper)")
    add(
        "--num-actions",
        type=int,
        nargs="+",
        default=[15, 30, 60, 120],
        help="rollouts an estimate: 15 (paper) 30 60 120",
    )
    add("--hold", type=int, default=3, help="steps that a rollout holds its action: 3 (released)")
    args = parser.parse_args()
    for name, value in {"num_states": args.num_states, "hold": args.hold}.items():
        if value < 1:
            stop(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return args


def similarities(actions, returns, of_critic, num_actions: int) -> tuple[float, float]:
    """Of two estimates, of `num_actions` rollouts each, and of the first and the critic's."""
    first, second = (
        estimate_gradient(actions[part], returns[part])
        for part in (slice(num_actions), slice(num_actions, 2 * num_actions))
    )
    return cosine_similarity(first, second), cosine_similarity(first, of_critic)


def main(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is a crash like any other
    torch.set_num_threads(1)
    runs = find_runs(args.runs)
    least, most = min(args.num_actions), max(args.num_actions)
    for run_args, _ in runs.values():
        make_envs(run_args.env_id, run_args.env_kwargs, 1, least)  # refuses too few
    exp_name = next(iter(runs.values()))[0].exp_name
    settings = dict(zip(SETTINGS, (args.num_states, args.hold, exp_name)))
    file = args.out / "gradient_reliability.csv"
    rows = read_table(file, COLUMNS, settings)
    if rows and {row[5] for row in rows} != set(args.num_actions):
        stop(f"{file} has other num_actions than {args.num_actions}, choose another --out")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"--out {args.out}: cannot write there: {error}")
    measured = {row[:4] for row in rows}
    todo = [(run, saved_steps(runs[run][1])[-1]) for run in sorted(runs)]
    todo = [(run, step) for run, step in todo if (*run, step) not in measured]
    for run, step in (bar := tqdm(todo, disable=None)):  # a bar on a terminal
        run_args, run_dir = runs[run]
        envs = make_envs(run_args.env_id, run_args.env_kwargs, args.num_states, 2 * most)
        state_envs, rollout_envs = envs[: args.num_states], envs[args.num_states :]
        agent = load_agent(run_args, run_dir, step, state_envs[0])
        rng = np.random.default_rng([run_args.seed, step])

        def policy(obs, agent=agent):
            return td3_hyper.act(agent.actor, obs)

        obs = sample_states(state_envs, policy, rng, state_envs[0].spec.max_episode_steps)
        for i, (s, a, of_critic) in enumerate(zip(obs, policy(obs), critic_gradient(agent, obs))):
            copy_checked(state_envs[i], rollout_envs, a)
            sampled = rollouts(agent, run_args.gamma, rollout_envs, s, a, args.hold, rng)
            for n in args.num_actions:
                numbers = similarities(*sampled, of_critic, n)
                rows.append((*run, step, i, n, *numbers, *settings.values()))
        table = pd.DataFrame(sorted(rows), columns=COLUMNS)
        td3_hyper.write(file, table.to_csv(index=False, float_format="%.6g"))
        bar.write(f"{run_dir} step {step} is measured")
        sys.stdout.flush()
    table = pd.DataFrame(rows, columns=COLUMNS)
    means = table.groupby(["env_id", "critic", "num_actions"])[SIMILARITIES].mean()
    print(means.round(2).to_string())


if __name__ == "__main__":
    main(parse_args())
