"""Speed of the four scripts, one Markdown table a command.

    python analysis/speed.py td3           # milliseconds of an update; also sac and pearl
    python analysis/speed.py maml          # seconds of an iteration, by phase

The arithmetics compared in a row take turns, and medians are printed. With --device cuda, "float32"
has full precision, "TF32" is what the scripts use for --precision float32, and "graph" means
--cuda-graph; there every update waits for its losses, as it does in training.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args, get_type_hints
from unittest.mock import patch

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the scripts do

import numpy as np
import torch
import tyro
from gradient_noise import make_policy_and_envs, update_once

import maml_hyper
import pearl_hyper
import sac_hyper
import td3_hyper
from hypernet import CudaGraph, tune

HOPPER, CHEETAH = (11, 3), (20, 6)  # sizes of observation and action
CRITICS = get_args(get_type_hints(td3_hyper.Args)["critic"])
SLOW_AND_MLP = ("sa-hyper", "as-hyper", "mlp-large", "resnet35", "mlp")
CPU = {"float32": {}, "bfloat16": {"precision": "bfloat16"}}
GPU = {"float32": {}, "TF32": {}, "bfloat16": {"precision": "bfloat16"}}
GPU |= {f"{name}, graph": options | {"cuda_graph": True} for name, options in GPU.items()}


def print_row(*cells: object) -> None:
    texts = (f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print(f"| {' | '.join(texts)} |", flush=True)


def print_head(rounds: int, device: str, title: str, *columns: str) -> None:
    if rounds < 1:
        td3_hyper.stop(f"--rounds {rounds}: must be at least 1")
    make_args(td3_hyper, device=device)  # exits if there is no such device
    tune(device, "float32")
    print(f"\n{title}; {device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n")
    print_row(*columns)
    print_row(*["---"] * len(columns))


def make_args(script, **options):
    """The arguments of a run; exits if one is out of range."""
    try:
        return script.Args(**options)
    except ValueError as error:
        td3_hyper.stop(str(error))


def make_updates(script, args) -> list[Callable[[], dict]]:
    """Functions that make an update each; of TD3's two, only one moves the actor."""
    torch.manual_seed(0)
    pearl = script is pearl_hyper
    shape = (args.meta_batch_size, args.batch_size) if pearl else (args.batch_size,)
    obs_dim, action_dim = CHEETAH if pearl else HOPPER
    agent = script.Agent(obs_dim, action_dim, args).to(args.device)
    randn = partial(torch.randn, device=args.device)
    wrap = CudaGraph if args.cuda_graph else lambda function: function
    batch = (randn(*shape, obs_dim), randn(*shape, action_dim).tanh(), randn(shape))
    batch += (randn(*shape, obs_dim), torch.zeros(shape, device=args.device))
    noise = randn(*shape, action_dim)
    if pearl:
        optimizers = pearl_hyper.make_optimizers(agent, args)
        context = randn(shape[0], args.context_batch_size, obs_dim + action_dim + 1)
        batch, z_noise = pearl_hyper.Batch(*batch, context), randn(shape[0], args.latent_dim)
        update = wrap(partial(pearl_hyper.update, agent, optimizers, args=args))
        return [partial(update, batch, z_noise, noise)]
    parts = {"critic": agent.critics.parameters(), "actor": agent.actor.parameters()}
    parts |= {"alpha": [agent.log_alpha]} if script is sac_hyper else {}
    adam = partial(torch.optim.Adam, lr=1e-4, fused=True, capturable=args.cuda_graph)
    optimizers, batch = {name: adam(p) for name, p in parts.items()}, script.Batch(*batch)
    critics = wrap(partial(script.update_critics, agent, optimizers, args=args))
    actor = wrap(partial(script.update_actor_and_targets, agent, optimizers, args=args))
    if script is sac_hyper:
        return [lambda: critics(batch, noise) | actor(batch, noise)]
    return [lambda: critics(batch, noise), lambda: critics(batch, noise) | actor(batch)]


def medians(functions: dict[str, Callable[[], list]], rounds: int) -> dict[str, list[float]]:
    """The medians of what each function measures; they take turns, and the first does not count."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            times[name].append(function())
    return {name: np.median(rows[1:], 0).tolist() for name, rows in times.items()}


def time_updates(name: str, updates: list[Callable[[], dict]], repeat: int) -> float:
    """Milliseconds of an update in an arithmetic of that name."""
    torch.backends.cuda.matmul.fp32_precision = "ieee" if "float32" in name else "tf32"
    start = time.perf_counter()
    for _ in range(repeat):
        for update in updates:
            torch.stack([*update().values()]).tolist()  # waits for the GPU
    return 1000 * (time.perf_counter() - start) / repeat / len(updates)


def print_updates(script, rows: list[dict], rounds: int, device: str, title: str) -> None:
    kinds, repeat = (CPU, 1) if device == "cpu" else (GPU, 20)
    title = f"Milliseconds of an update of {script.__name__}.py, {title}"
    print_head(rounds, device, title, *rows[0], *kinds)
    for row in rows:
        functions = {}
        for name, options in kinds.items():
            updates = make_updates(script, make_args(script, device=device, **row, **options))
            functions[name] = partial(time_updates, name, updates, repeat)
        print_row(*row.values(), *medians(functions, rounds).values())


def off_policy(
    script,
    critics: tuple[Literal[CRITICS], ...] = SLOW_AND_MLP,
    batch_sizes: tuple[int, ...] = (100, 256),
    rounds: int = 5,
    device: str = "cpu",
) -> None:
    """Milliseconds of an update."""
    rows = [{"critic": c, "batch_size": B} for c in critics for B in batch_sizes]
    print_updates(script, rows, rounds, device, "sizes of Hopper")


def pearl(num_goals: tuple[int, ...] = (16, 4), rounds: int = 5, device: str = "cpu") -> None:
    """Milliseconds of an update."""
    rows = [{"model": m, "meta_batch_size": T} for m in ("mlp", "hyper") for T in num_goals]
    print_updates(pearl_hyper, rows, rounds, device, "HalfCheetah, 256 transitions a goal")


MAML_ROWS = {
    "vanilla": {"model": "vanilla"},
    "context": {"model": "context"},
    "hyper": {},
    "hyper, bfloat16": {"precision": "bfloat16"},
    "hyper, first order": {"first_order": True},
    "hyper, no adaptation": {"num_adapt_steps": 0},
}
PHASES = "collect_episodes inner_step meta_gradient fisher_product line_search evaluate".split()


def maml(models: tuple[Literal[tuple(MAML_ROWS)], ...] = tuple(MAML_ROWS), rounds: int = 5) -> None:
    """Seconds of an iteration at 40 training goals and 20 test goals, on the CPU."""
    seconds, starts = Counter(), []

    def timed(phase: str, function: Callable, *inputs, **options):
        if starts:  # an inner step within the gradient counts as the gradient's
            return function(*inputs, **options)
        starts.append(time.perf_counter())
        result = function(*inputs, **options)
        seconds[phase] += time.perf_counter() - starts.pop()
        return result

    def iteration(*inputs) -> list[float]:
        seconds.clear()
        start = time.perf_counter()
        update_once(*inputs)
        return [*(seconds[phase] for phase in PHASES), time.perf_counter() - start]

    maml_hyper.keep_freed_memory()
    title = "Seconds of an iteration of maml_hyper.py, HalfCheetahFwdBack-v0, 40 goals"
    print_head(rounds, "cpu", title, "model", *PHASES, "whole")
    iterations = {}
    for name in models:
        args = make_args(maml_hyper, device="cpu", **MAML_ROWS[name])
        inputs = (*make_policy_and_envs(args), np.random.default_rng(1), args)
        iterations[name] = partial(iteration, *inputs)
    functions = {phase: partial(timed, phase, getattr(maml_hyper, phase)) for phase in PHASES}
    with patch.multiple(maml_hyper, **functions):
        for name, row in medians(iterations, rounds).items():
            print_row(name, *row)


if __name__ == "__main__":
    commands = {"td3": partial(off_policy, td3_hyper), "sac": partial(off_policy, sac_hyper)}
    commands |= {table.__name__: table for table in (pearl, maml)}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
