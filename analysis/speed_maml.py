"""Speed of the batched tasks and of an iteration of MAML.

    python analysis/speed_maml.py               # seconds of one iteration by phase, peak memory
    python analysis/speed_maml.py --sampling    # environment steps a second, three vector classes

The first runs whole iterations at the paper's batch (40 goals, 20 episodes, 200 steps; evaluation
on 20 goals) and prints medians; each row is a process of its own. The second takes turns between
`MetaVectorEnv`, Gymnasium's SyncVectorEnv and its AsyncVectorEnv, each stepped with the actions of
the same policy, and prints medians; the last columns are how many times the other's steps a second.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import maml_hyper  # noqa: E402
from meta_envs import MetaVectorEnv, sample_goals  # noqa: E402

PHASES = {  # name in the table: function of maml_hyper.py
    "sample": "sample",
    "adapt": "inner_step",
    "gradient": "meta_gradient",
    "CG": "conjugate_gradient",
    "line search": "line_search",
}
ROWS = ("vanilla", "context", "hyper", "hyper, first order", "hyper, no adaptation")


@dataclass
class Args:
    """Print a speed table."""

    sampling: bool = False
    """measure sampling instead of whole iterations"""
    rounds: int = 3
    """repetitions, of which medians are printed"""
    env_id: str = "HalfCheetahFwdBack-v0"
    """family of the iterations"""
    meta_batch_size: int = 40
    """training goals of an iteration"""
    num_test_goals: int = 20
    """goals of an evaluation"""
    rows: tuple[str, ...] = ROWS
    """rows of the table of iterations"""
    one_row: str | None = None
    """print the figures of this row alone, as JSON; the table calls itself with this"""


def iteration_seconds(name: str, args: Args) -> dict[str, float]:
    """Median seconds of each phase, of the whole iteration, and the peak memory in GiB."""
    model = name.split(",")[0]
    options = {
        "first_order": "first order" in name,
        "num_adapt_steps": 0 if "no adaptation" in name else 1,
        "inner_lr": 5e-5 if model == "hyper" else 0.1,
        "meta_batch_size": args.meta_batch_size,
    }
    maml_args = maml_hyper.Args(env_id=args.env_id, model=model, device="cpu", **options)
    maml_hyper.fast_matmul()
    maml_hyper.keep_freed_memory()
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    goals, test_goals = (
        sample_goals(args.env_id, n, rng) for n in (args.meta_batch_size, args.num_test_goals)
    )
    envs = MetaVectorEnv(args.env_id, goals, 20, torch.get_num_threads())
    test_envs = MetaVectorEnv(args.env_id, test_goals, 20, torch.get_num_threads())
    sizes = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    policy = maml_hyper.Policy(*sizes, maml_args)

    seconds, depth = {}, []

    def timed(phase, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            depth.append(phase)
            result = function(*args, **kwargs)
            depth.pop()
            if not depth:  # an inner step within the gradient counts as the gradient's
                seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
            return result

        return call

    for phase, function in PHASES.items():
        setattr(maml_hyper, function, timed(phase, getattr(maml_hyper, function)))
    evaluate = timed("evaluate", maml_hyper.adapt_and_sample)

    rounds = []
    for _ in range(args.rounds + 1):  # the first warms up
        seconds.clear()
        start = time.perf_counter()
        episodes = maml_hyper.adapt_and_sample(policy, envs, rng, maml_args)
        evaluate(policy, test_envs, rng, maml_args)
        maml_hyper.update(policy, episodes, maml_args)
        rounds.append(seconds | {"iteration": time.perf_counter() - start})
    medians = {
        phase: statistics.median(r.get(phase, 0.0) for r in rounds[1:])
        for phase in [*PHASES, "evaluate", "iteration"]
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return medians | {"peak GiB": peak}


def iteration_table(args: Args) -> None:
    columns = [*PHASES, "evaluate", "iteration", "peak GiB"]
    batch = f"{args.meta_batch_size} goals x 20 episodes x 200 steps"
    print(
        f"\nSeconds of an iteration of {args.env_id}, {batch}, {torch.get_num_threads()} threads\n"
    )
    print(f"| model | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name in args.rows:
        command = [sys.executable, __file__, "--one-row", name, "--rounds", str(args.rounds)]
        command += ["--env-id", args.env_id, "--meta-batch-size", str(args.meta_batch_size)]
        command += ["--num-test-goals", str(args.num_test_goals)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        print(f"| {name} | {' | '.join(f'{row[c]:.1f}' for c in columns)} |", flush=True)


def steps_a_second(envs, policy, context: torch.Tensor, steps: int) -> float:
    """With the policy's actions; goal-major slots, one forward pass for all."""
    obs, _ = envs.reset(seed=1)
    tasks = len(context)
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(steps):
            batch = torch.as_tensor(obs, dtype=torch.float32).view(tasks, -1, obs.shape[-1])
            action = policy(context, batch)[0].numpy().reshape(envs.num_envs, -1)
            obs, *_ = envs.step(action.clip(-1, 1))
    return steps * envs.num_envs / (time.perf_counter() - start)


def sampling_table(args: Args) -> None:
    gym.logger.min_level = gym.logger.ERROR
    threads = torch.get_num_threads()
    print(f"\nEnvironment steps a second, context policy included, {threads} threads\n")
    print("| family | simulations | MetaVectorEnv | Sync, 40 | Async, 2 | of Sync | of Async |")
    print("|---|---|---|---|---|---|---|")
    for env_id in ("HalfCheetahVel-v0", "AntVel-v0"):
        make = [lambda env_id=env_id: gym.make(env_id, goal=1.0)]
        sync, workers = gym.vector.SyncVectorEnv(make * 40), gym.vector.AsyncVectorEnv(make * 2)
        sizes = sync.single_observation_space.shape[0], sync.single_action_space.shape[0]
        policy = maml_hyper.Policy(*sizes, replace(maml_hyper.Args(), model="context"))
        for num_goals in (5, 40, 100):
            batched = MetaVectorEnv(env_id, [1.0] * num_goals, 20, threads)
            rates = []
            for _ in range(args.rounds + 1):
                row = []
                for envs, tasks, steps in (
                    (batched, num_goals, max(20, 20_000 // batched.num_envs)),
                    (sync, 2, 100),
                    (workers, 2, 500),
                ):
                    row.append(steps_a_second(envs, policy, torch.ones(tasks, 1), steps))
                rates.append(row)
            rates = np.array(rates[1:])
            medians = np.median(rates, 0)
            ratios = np.median(rates[:, :1] / rates[:, 1:], 0)
            numbers = " | ".join(f"{rate:,.0f}" for rate in medians)
            print(
                f"| {env_id} | {batched.num_envs} | {numbers} | {ratios[0]:.1f} | {ratios[1]:.1f} |"
            )
            batched.close()
        sync.close()
        workers.close()


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.one_row:
        print(json.dumps(iteration_seconds(args.one_row, args)))
    elif args.sampling:
        sampling_table(args)
    else:
        iteration_table(args)
