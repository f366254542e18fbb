"""Speed of the four scripts on the CPU, one Markdown table a command.

    python analysis/speed.py td3           # milliseconds of an update; also sac and pearl
    python analysis/speed.py maml          # seconds of an iteration, by phase
    python analysis/speed.py sampling      # environment steps a second of MAML's batched tasks
    python analysis/speed.py collection    # environment steps a second of PEARL
    python analysis/speed.py cores         # two runs that share two cores (Linux)

What is compared in a row takes turns, and medians are printed. "Plain" is an update as it is
usually written: default Adam, a loop over parameters for the targets, the critics frozen after
their forward pass (as published), the default arithmetic of matrix products and, in PEARL, weights
of the policy for each transition in place of each task. The "floor" is the matrix products of our
update alone, replayed into memory that is there already, and one pass of Adam over the critics.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the scripts do

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import maml_hyper
import pearl_hyper
import sac_hyper
import td3_hyper
from hypernet import CRITICS, keep_freed_memory, tune
from meta_envs import HORIZON, MetaVectorEnv, sample_goals
from td3_hyper import stop

FWD_BACK, VEL = "HalfCheetahFwdBack-v0", "HalfCheetahVel-v0"
HOPPER, CHEETAH = (11, 3), (20, 6)  # sizes of observation and action
THREADS = torch.get_num_threads()
FULL_SIZE = (256, 512, 1024)  # widths of the primary networks
SLOW_AND_MLP = ("sa-hyper", "as-hyper", "mlp-large", "resnet35", "mlp")
Counts = tuple[int, ...]


def print_row(*cells: object) -> None:
    texts = (f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print(f"| {' | '.join(texts)} |", flush=True)


def at_least_1(flag: str, *numbers: int) -> None:
    for number in numbers:
        if number < 1:
            stop(f"{flag} {number}: must be at least 1")


def make_args(script, **options):
    """The arguments of a run on the CPU; ends here if one is out of range."""
    try:
        return script.Args(device="cpu", **options)
    except ValueError as error:
        stop(str(error))


def print_head(rounds: int, title: str, *columns: str) -> None:
    at_least_1("--rounds", rounds)
    print(f"\n{title}; {THREADS} threads, PyTorch {torch.__version__}\n")
    print_row(*columns)
    print_row(*["---"] * len(columns))


def median_seconds(rounds: int, **functions: Callable[[], object]) -> dict[str, float]:
    """Of functions that take turns, after one round to warm up; "plain" has default arithmetic."""
    tuned, times = torch.backends.mkldnn.matmul.fp32_precision, {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            torch.backends.mkldnn.matmul.fp32_precision = "ieee" if name == "plain" else tuned
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    torch.backends.mkldnn.matmul.fp32_precision = tuned
    return {name: np.median(seconds[1:]).item() for name, seconds in times.items()}


def loop_over_targets(targets: list, online: list, tau: float) -> None:
    for t, p in zip(targets, online):
        t.data.copy_(tau * p.data + (1 - tau) * t.data)


def plain_td3(agent, optimizers, batch, noise, args, delayed) -> None:
    """TD3's update as it is usually written."""
    td3_hyper.descend(td3_hyper.critic_loss(agent, batch, noise, args), optimizers["critic"])
    if delayed:
        loss = -agent.critics[0](batch[0], agent.actor(batch[0])).mean()
        agent.critics.requires_grad_(False)
        td3_hyper.descend(loss, optimizers["actor"])
        agent.critics.requires_grad_(True)
        loop_over_targets(agent.targets, agent.online, args.tau)


def plain_sac(agent, optimizers, batch, noise, args) -> None:
    """SAC's update as it is usually written."""
    sac_hyper.descend(sac_hyper.critic_loss(agent, batch, noise[0], args), optimizers["critic"])
    action, log_prob = agent.actor.sample(batch[0], noise[1])
    q = torch.min(*(critic(batch[0], action) for critic in agent.critics))
    agent.critics.requires_grad_(False)
    loss = (agent.log_alpha.exp().detach() * log_prob - q).mean()
    sac_hyper.descend(loss, optimizers["actor"])
    agent.critics.requires_grad_(True)
    loss = sac_hyper.alpha_loss(agent, log_prob.detach(), action.shape[-1])
    sac_hyper.descend(loss, optimizers["alpha"])
    loop_over_targets(agent.targets, agent.online, args.tau)


def plain_pearl(agent, optimizers, batch, z_noise, noise, args) -> None:
    """PEARL's update as it is usually written: B = T * N transitions, each with its z."""
    z, kl = pearl_hyper.infer(agent, batch.context, z_noise)
    loss = pearl_hyper.q_loss(agent, batch, z, args) + args.kl_weight * kl
    pearl_hyper.descend(loss, optimizers["q"], optimizers["encoder"])
    z = z.detach().repeat_interleave(batch.obs.shape[1], 0)  # (B, z)
    obs, noise = batch.obs.flatten(0, 1), noise.flatten(0, 1)
    output = agent.policy.net(*((z, obs) if args.model == "hyper" else (obs, z)))
    mean, log_std = output.chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    u = mean + log_std.exp() * noise
    q = torch.min(*(critic(obs, torch.tanh(u), z) for critic in agent.q))
    agent.q.requires_grad_(False)
    y = q - pearl_hyper.log_prob(u, noise, log_std)
    pearl_hyper.descend(F.mse_loss(agent.v(obs, z), y.detach()), optimizers["v"])
    regularisation = mean.square().mean() + log_std.square().mean()
    pearl_hyper.descend(args.policy_reg * regularisation - y.mean(), optimizers["policy"])
    agent.q.requires_grad_(True)
    loop_over_targets(agent.target, agent.online, args.tau)


PLAIN = {td3_hyper: plain_td3, sac_hyper: plain_sac, pearl_hyper: plain_pearl}


class Products(TorchDispatchMode):
    """Records the matrix products of what runs inside, to run them again alone."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = (x.detach() for x in args[-2:])
            product = torch.bmm if "bmm" in name else torch.mm
            self.calls.append(partial(product, a, b, out=torch.empty_like(out).detach()))
        return out


def two_updates(script, run_args, plain: bool = False) -> tuple[Callable, dict]:
    """A function that makes two (of TD3's, one has the actor's part), and the optimizers."""
    torch.manual_seed(0)
    shape, (obs_dim, action_dim) = (run_args.batch_size,), HOPPER  # (B,)
    if script is pearl_hyper:
        shape, (obs_dim, action_dim) = (run_args.meta_batch_size, *shape), CHEETAH  # (T, N)
    obs, next_obs = torch.randn(2, *shape, obs_dim)
    action, noise = torch.rand(*shape, action_dim) * 2 - 1, torch.randn(2, *shape, action_dim)
    batch = (obs, action, torch.randn(shape), next_obs, torch.zeros(shape))
    agent = script.Agent(obs_dim, action_dim, run_args)
    if script is pearl_hyper:
        optimizers = pearl_hyper.make_optimizers(agent, run_args)
        context = torch.randn(shape[0], run_args.context_batch_size, obs_dim + action_dim + 1)
        batch = pearl_hyper.Batch(*batch, context)
        inputs = [(torch.randn(shape[0], run_args.latent_dim), noise[0], run_args)] * 2
    else:
        parts = {"critic": agent.critics.parameters(), "actor": agent.actor.parameters()}
        inputs = [(noise[0], run_args, delayed) for delayed in (False, True)]
        if script is sac_hyper:
            parts["alpha"], inputs = [agent.log_alpha], [(noise, run_args)] * 2
        optimizers = {name: torch.optim.Adam(p, 1e-4, fused=True) for name, p in parts.items()}
    for adam in optimizers.values():
        adam.param_groups[0]["fused"] = not plain
    update = PLAIN[script] if plain else script.update
    return lambda: [update(agent, optimizers, batch, *rest) for rest in inputs], optimizers


def print_updates(script, rows: list[dict], rounds: int, title: str, **sizes) -> None:
    floor = ["floor"] if script is not pearl_hyper else []
    title = f"Milliseconds of an update of {script.__name__}.py, {title}"
    print_head(rounds, title, *rows[0], "plain", "ours", "bfloat16", *floor, "plain / ours")
    for row in rows:
        run_args = make_args(script, **sizes, **row)
        functions = {"plain": two_updates(script, run_args, plain=True)[0]}
        functions["ours"], optimizers = two_updates(script, run_args)
        functions["bfloat16"], _ = two_updates(script, replace(run_args, precision="bfloat16"))
        if floor:
            with Products() as products:
                functions["ours"]()
            calls = [*products.calls, *[optimizers["critic"].step] * 2]
            functions["floor"] = torch.no_grad()(lambda calls=calls: [call() for call in calls])
        ms = [500 * s for s in median_seconds(rounds, **functions).values()]
        print_row(*row.values(), *ms, f"{ms[0] / ms[1]:.2f}")


def off_policy(
    script,
    critics: tuple[Literal[CRITICS], ...] = SLOW_AND_MLP,
    batch_sizes: Counts = (100, 256),
    primary_widths: Counts = FULL_SIZE,
    rounds: int = 5,
) -> None:
    """Milliseconds of an update."""
    rows = [{"critic": c, "batch_size": B} for c in critics for B in batch_sizes]
    print_updates(script, rows, rounds, "sizes of Hopper", primary_widths=primary_widths)


def pearl(num_goals: Counts = (16, 4), primary_widths: Counts = FULL_SIZE, rounds: int = 5) -> None:
    """Milliseconds of an update."""
    rows = [{"model": m, "meta_batch_size": T} for m in ("mlp", "hyper") for T in num_goals]
    title, sizes = f"{VEL}, 256 transitions a goal", {"primary_widths": primary_widths}
    print_updates(pearl_hyper, rows, rounds, title, env_id=VEL, **sizes)


MAML_ROWS = {
    "vanilla": {"model": "vanilla"},
    "context": {"model": "context"},
    "hyper": {},
    "hyper, bfloat16": {"precision": "bfloat16"},
    "hyper, first order": {"first_order": True},
    "hyper, no adaptation": {"num_adapt_steps": 0},
}
PHASES = "sample inner_step meta_gradient fisher_product line_search evaluate".split()


def maml(num_goals: Counts = (40,), primary_widths: Counts = FULL_SIZE, rounds: int = 5) -> None:
    """Seconds of an iteration at a number of training goals, evaluated on half as many."""
    seconds, starts = Counter(), []

    def timed(phase: str, function: Callable, *inputs):
        if starts:  # an inner step within the gradient counts as the gradient's
            return function(*inputs)
        starts.append(time.perf_counter())
        result = function(*inputs)
        seconds[phase] += time.perf_counter() - starts.pop()
        return result

    def iteration(policy, envs, test_envs, rng, run_args) -> list[float]:
        seconds.clear()
        start = time.perf_counter()
        rollouts, pre, steps = maml_hyper.adapt_and_sample(policy, envs, rng, run_args)
        maml_hyper.evaluate(policy, test_envs, run_args)
        post = maml_hyper.make_batch(rollouts[-1], run_args)
        maml_hyper.update(policy, maml_hyper.Episodes(pre, steps, post), run_args)
        return [*(seconds[phase] for phase in PHASES), time.perf_counter() - start]

    at_least_1("--num-goals", *num_goals)
    keep_freed_memory()
    title = f"Seconds of an iteration of maml_hyper.py, {FWD_BACK}, in its functions"
    print_head(rounds, title, "model", "goals", *PHASES, "whole")
    functions = {phase: partial(timed, phase, getattr(maml_hyper, phase)) for phase in PHASES}
    for T in num_goals:
        rng = np.random.default_rng(1)
        goals = sample_goals(FWD_BACK, T, rng)
        sizes = {"num_train_goals": T, "meta_batch_size": T, "primary_widths": primary_widths}
        for name, options in MAML_ROWS.items():
            run_args = make_args(maml_hyper, **sizes, **options)
            simulation = (run_args.episodes_per_goal, THREADS, run_args.horizon)
            envs = MetaVectorEnv(FWD_BACK, goals, *simulation)
            test_envs = MetaVectorEnv(FWD_BACK, goals[: (T + 1) // 2], *simulation)
            inputs = (maml_hyper.Policy(*CHEETAH, run_args), envs, test_envs, rng, run_args)
            with patch.multiple(maml_hyper, **functions):
                phases = [iteration(*inputs) for _ in range(rounds + 1)]
            print_row(name, T, *np.median(phases[1:], 0).tolist())


@torch.inference_mode()
def step_all(envs, policy: maml_hyper.Policy, num_tasks: int, num_steps: int) -> None:
    """Steps `envs` with the policy's actions: goal-major slots, one forward pass for all."""
    obs, _ = envs.reset(seed=1)
    for _ in range(num_steps):
        batch = torch.as_tensor(obs, dtype=torch.float32).view(num_tasks, -1, obs.shape[-1])
        action = policy(torch.ones(num_tasks, 1), batch)[0].numpy()
        obs, *_ = envs.step(action.reshape(envs.num_envs, -1).clip(-1, 1))


def sampling(num_goals: Counts = (5, 40, 100), rounds: int = 5) -> None:
    """Environment steps a second of the batched tasks, 20 episodes a goal."""
    at_least_1("--num-goals", *num_goals)
    columns = ("MetaVectorEnv", "SyncVectorEnv of 40", "AsyncVectorEnv of 2", "/ Sync", "/ Async")
    title = "Environment steps a second with the actions of MAML's context policy"
    print_head(rounds, title, "family", "simulations", *columns)
    for env_id in (VEL, "AntVel-v0"):
        make = [lambda env_id=env_id: gym.make(env_id, goal=1.0)]
        sync, workers = gym.vector.SyncVectorEnv(make * 40), gym.vector.AsyncVectorEnv(make * 2)
        dims = sync.single_observation_space.shape + sync.single_action_space.shape
        policy = maml_hyper.Policy(*dims, make_args(maml_hyper, model="context"))
        for T in num_goals:
            batched = MetaVectorEnv(env_id, [1.0] * T, 20, THREADS)
            turns = [(batched, T, max(20, 20_000 // batched.num_envs))]
            turns += [(sync, 2, 100), (workers, 2, 500)]  # environments, tasks, steps
            functions = {
                str(i): partial(step_all, e, policy, *n) for i, (e, *n) in enumerate(turns)
            }
            seconds = median_seconds(rounds, **functions).values()
            rates = [n * e.num_envs / s for (e, _, n), s in zip(turns, seconds)]
            numbers = (f"{rate:,.0f}" for rate in rates)
            print_row(env_id, batched.num_envs, *numbers, rates[0] / rates[1], rates[0] / rates[2])
            batched.close()
        sync.close()
        workers.close()


@torch.no_grad()
def one_trajectory(policy: pearl_hyper.Policy, env: gym.Env, deterministic: bool) -> None:
    """z and the state go through the networks at every step."""
    z, done, (obs, _) = torch.randn(1, 5), False, env.reset(seed=0)
    while not done:
        obs = torch.as_tensor(obs, dtype=torch.float32).view(1, 1, -1)
        mean, log_std = policy.dynamic(policy.generate(z), obs)
        u = mean if deterministic else mean + log_std.exp() * torch.randn_like(mean)
        obs, _, terminated, truncated, _ = env.step(torch.tanh(u).flatten().numpy())
        done = terminated or truncated


def collect(agent: pearl_hyper.Agent, envs: MetaVectorEnv, run_args: pearl_hyper.Args) -> None:
    """The data of an iteration, into empty buffers."""
    tasks = pearl_hyper.make_tasks(envs.goals, *CHEETAH, run_args)
    inputs, rng = (agent, envs, tasks, np.arange(len(envs.goals))), np.random.default_rng(0)
    pearl_hyper.collect(*inputs, run_args.num_prior_steps, rng, run_args, posterior=False)
    pearl_hyper.collect(*inputs, run_args.num_posterior_steps, rng, run_args, posterior=True)


def collection(
    num_goals: Counts = (60,), primary_widths: Counts = FULL_SIZE, rounds: int = 5
) -> None:
    """Environment steps a second of PEARL's collection, in 5 tasks, and of its evaluation."""
    at_least_1("--num-goals", *num_goals)
    columns = ("model", "what", "side by side", "one trajectory at a time", "times")
    print_head(rounds, f"Environment steps a second of pearl_hyper.py, {VEL}", *columns)
    env, evaluate = gym.make(VEL, goal=1.0), pearl_hyper.evaluate
    for T in num_goals:
        goals = sample_goals(VEL, T, np.random.default_rng(0))
        envs = MetaVectorEnv(VEL, np.resize(goals, 5), 3, THREADS)
        eval_envs = MetaVectorEnv(VEL, goals, 1, THREADS)
        for model in ("mlp", "hyper"):
            sizes = {"env_id": VEL, "primary_widths": primary_widths}
            run_args = make_args(pearl_hyper, model=model, **sizes)
            agent = pearl_hyper.Agent(*CHEETAH, run_args)
            for what, steps, function, slots in (
                ("collection, 5 goals", 5 * 1_000, collect, envs),
                (f"evaluation, {T} goals", 3 * HORIZON * T, evaluate, eval_envs),
            ):
                ours = partial(function, agent, slots, run_args)
                alone = partial(
                    one_trajectory, agent.policy, env, deterministic=function is evaluate
                )
                seconds = median_seconds(rounds, ours=ours, alone=alone)
                rates = steps / seconds["ours"], HORIZON / seconds["alone"]
                print_row(model, what, *(f"{rate:,.0f}" for rate in rates), rates[0] / rates[1])


def one_of_two_runs(seconds: float, primary_widths: tuple[int, ...]) -> None:
    """Prints the mean milliseconds of an update of TD3, once a line on stdin says to start."""
    tune("cpu", "float32")
    run_args = make_args(td3_hyper, critic="sa-hyper", primary_widths=primary_widths)
    updates, _ = two_updates(td3_hyper, run_args)
    updates()
    print("ready", flush=True)
    input()
    start, number = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        updates()
        number += 2
    print(1e3 * (time.perf_counter() - start) / number)


VARIABLES = ({}, {"GOMP_SPINCOUNT": "1000"}, {"OMP_NUM_THREADS": "1"})


def cores(primary_widths: Counts = FULL_SIZE, rounds: int = 5) -> None:
    """Milliseconds of an update of TD3 alone and of two at once, mean of --rounds seconds."""
    two = sorted(os.sched_getaffinity(0))[:2]
    # OpenMP reads its variables when torch is imported, here before speed.py sets one
    code = f"import os; os.sched_setaffinity(0, {two}); import torch, speed; "
    code += f"speed.one_of_two_runs({rounds}, {primary_widths})"
    title = "Milliseconds of an update of td3_hyper.py, sa-hyper, batch 100, on two cores"
    print_head(rounds, title, "environment variable", "alone", "two at once", "")
    unset = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    for variable in VARIABLES:
        cells = []
        for number in (1, 2):
            start = partial(subprocess.Popen, [sys.executable, "-c", code], text=True)
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            options = {"cwd": Path(__file__).parent, "env": unset | variable, **pipes}
            runs = [start(**options) for _ in range(number)]
            for run in runs:
                run.stdout.readline()
            for run in runs:
                run.stdin.write("\n")
                run.stdin.flush()
            cells += [float(run.communicate()[0]) for run in runs]
        print_row(*(map("=".join, variable.items()) if variable else ["none"]), *cells)


if __name__ == "__main__":
    gym.logger.min_level = gym.logger.ERROR
    tune("cpu", "float32")
    commands = {"td3": partial(off_policy, td3_hyper), "sac": partial(off_policy, sac_hyper)}
    commands |= {table.__name__: table for table in (pearl, maml, sampling, collection, cores)}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
