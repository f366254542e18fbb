"""Speed of the four scripts, one Markdown table a command.

    python analysis/speed.py td3           # milliseconds of an update; also sac and pearl
    python analysis/speed.py maml          # seconds of an iteration, by phase

The arithmetics compared in a row take turns, and medians are printed. With --device cuda, "float32"
has full precision, "TF32" is what the scripts use for --precision float32, and "graph" means
--cuda-graph; there every update waits for its losses, as it does in training.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_type_hints
from unittest.mock import patch

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the scripts do

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

import maml_hyper
import pearl_hyper
import sac_hyper
import td3_hyper
from hypernet import CudaGraph, tune
from meta_envs import MetaVectorEnv, sample_goals

FWD_BACK, VEL = "HalfCheetahFwdBack-v0", "HalfCheetahVel-v0"
HOPPER, CHEETAH = (11, 3), (20, 6)  # sizes of observation and action
FULL_SIZE = (256, 512, 1024)  # widths of the primary networks
CRITICS = get_args(get_type_hints(td3_hyper.Args)["critic"])
SLOW_AND_MLP = ("sa-hyper", "as-hyper", "mlp-large", "resnet35", "mlp")
Counts = tuple[int, ...]


def print_row(*cells: object) -> None:
    texts = (f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print(f"| {' | '.join(texts)} |", flush=True)


def print_head(rounds: int, device: str, title: str, *columns: str) -> None:
    if rounds < 1:
        td3_hyper.stop(f"--rounds {rounds}: must be at least 1")
    tune(device, "float32")
    name = f"{torch.get_num_threads()} threads"
    name = name if device == "cpu" else torch.cuda.get_device_name(device)
    print(f"\n{title}; {name}, PyTorch {torch.__version__}\n")
    print_row(*columns)
    print_row(*["---"] * len(columns))


def make_args(script, **options):
    """The arguments of a run; exits if one is out of range."""
    try:
        return script.Args(**options)
    except ValueError as error:
        td3_hyper.stop(str(error))


def arithmetics(device: str) -> dict[str, dict]:
    """Name and arguments of what is compared on a device."""
    if device == "cpu":
        return {"float32": {}, "bfloat16": {"precision": "bfloat16"}}
    plain = {"float32": {}, "TF32": {}, "bfloat16": {"precision": "bfloat16"}}
    return plain | {f"{name}, graph": o | {"cuda_graph": True} for name, o in plain.items()}


def set_tf32(name: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee" if "float32" in name else "tf32"


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


def print_updates(script, rows: list[dict], rounds: int, device: str, title: str, **sizes) -> None:
    kinds, repeat = arithmetics(device), 1 if device == "cpu" else 20
    title = f"Milliseconds of an update of {script.__name__}.py, {title}"
    print_head(rounds, device, title, *rows[0], *kinds, "first / last")
    for row in rows:
        updates = {}
        for name, options in kinds.items():
            args = make_args(script, device=device, **sizes, **row, **options)
            updates[name] = make_updates(script, args)
        times = {name: [] for name in kinds}
        for _ in range(rounds + 1):
            for name, functions in updates.items():
                set_tf32(name)
                start = time.perf_counter()
                for _ in range(repeat):
                    for function in functions:
                        torch.stack([*function().values()]).tolist()  # waits for the GPU
                times[name].append((time.perf_counter() - start) / repeat / len(functions))
        ms = [1000 * np.median(seconds[1:]).item() for seconds in times.values()]
        print_row(*row.values(), *ms, ms[0] / ms[-1])


def off_policy(
    script,
    critics: tuple[Literal[CRITICS], ...] = SLOW_AND_MLP,
    batch_sizes: Counts = (100, 256),
    primary_widths: Counts = FULL_SIZE,
    rounds: int = 5,
    device: str = "cpu",
) -> None:
    """Milliseconds of an update."""
    rows = [{"critic": c, "batch_size": B} for c in critics for B in batch_sizes]
    print_updates(script, rows, rounds, device, "sizes of Hopper", primary_widths=primary_widths)


def pearl(
    num_goals: Counts = (16, 4),
    primary_widths: Counts = FULL_SIZE,
    rounds: int = 5,
    device: str = "cpu",
) -> None:
    """Milliseconds of an update."""
    rows = [{"model": m, "meta_batch_size": T} for m in ("mlp", "hyper") for T in num_goals]
    title, sizes = f"{VEL}, 256 transitions a goal", {"primary_widths": primary_widths}
    print_updates(pearl_hyper, rows, rounds, device, title, env_id=VEL, **sizes)


MAML_ROWS = {
    "vanilla": {"model": "vanilla"},
    "context": {"model": "context"},
    "hyper": {},
    "hyper, bfloat16": {"precision": "bfloat16"},
    "hyper, first order": {"first_order": True},
    "hyper, no adaptation": {"num_adapt_steps": 0},
}
PHASES = "collect_episodes inner_step meta_gradient fisher_product line_search evaluate".split()


def maml(
    models: tuple[Literal[tuple(MAML_ROWS)], ...] = tuple(MAML_ROWS),
    num_goals: int = 40,
    primary_widths: Counts = FULL_SIZE,
    rounds: int = 5,
    device: str = "cpu",
) -> None:
    """Seconds of an iteration at a number of training goals, evaluated on half as many."""
    seconds, starts = Counter(), []

    def timed(phase: str, function: Callable, *inputs, **options):
        if starts:  # an inner step within the gradient counts as the gradient's
            return function(*inputs, **options)
        starts.append(time.perf_counter())
        result = function(*inputs, **options)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds[phase] += time.perf_counter() - starts.pop()
        return result

    def iteration(policy, envs, test_envs, rng, args) -> list[float]:
        seconds.clear()
        start = time.perf_counter()
        rollouts, pre, steps = maml_hyper.adapt_and_sample(policy, envs, rng, args)
        maml_hyper.evaluate(policy, test_envs, args)
        post = maml_hyper.make_batch(rollouts[-1], args)
        maml_hyper.update(policy, maml_hyper.MetaBatch(pre, steps, post), args)
        return [*(seconds[phase] for phase in PHASES), time.perf_counter() - start]

    maml_hyper.keep_freed_memory()
    title = f"Seconds of an iteration of maml_hyper.py, {FWD_BACK}, {num_goals} goals"
    print_head(rounds, device, title, "model", *PHASES, "whole")
    functions = {phase: partial(timed, phase, getattr(maml_hyper, phase)) for phase in PHASES}
    rng = np.random.default_rng(1)
    sizes = {"num_train_goals": num_goals, "meta_batch_size": num_goals, "device": device}
    inputs = {}
    for name in models:
        args = make_args(maml_hyper, primary_widths=primary_widths, **sizes, **MAML_ROWS[name])
        goals = sample_goals(FWD_BACK, num_goals, rng)
        simulation = (args.episodes_per_goal, torch.get_num_threads(), args.horizon)
        envs = MetaVectorEnv(FWD_BACK, goals, *simulation)
        test_envs = MetaVectorEnv(FWD_BACK, goals[: (num_goals + 1) // 2], *simulation)
        policy = maml_hyper.Policy(*CHEETAH, args).to(device)
        inputs[name] = (policy, envs, test_envs, rng, args)
    times = {name: [] for name in models}
    with patch.multiple(maml_hyper, **functions):
        for _ in range(rounds + 1):
            for name in models:
                times[name].append(iteration(*inputs[name]))
    for name in models:
        print_row(name, *np.median(times[name][1:], 0).tolist())


if __name__ == "__main__":
    commands = {"td3": partial(off_policy, td3_hyper), "sac": partial(off_policy, sac_hyper)}
    commands |= {table.__name__: table for table in (pearl, maml)}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
