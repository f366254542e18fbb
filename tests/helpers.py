"""What the tests share: starting the scripts, comparing runs, walking a loss's graph."""

import os
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import td3_hyper

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
CRITICS = get_args(get_type_hints(td3_hyper.Args)["critic"])
Finished = namedtuple("Finished", ["code", "out", "err"])


def start(script, *args: object, **options) -> subprocess.Popen:
    """Starts a script as a process of its own."""
    command = [sys.executable, str(script), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **({"env": ENVIRONMENT} | pipes | options))


# A small run of TD3 or SAC
SMALL = ["--env-id", "InvertedPendulum-v4", "--critic", "mlp-small", "--learning-starts", 100]
SMALL += ["--batch-size", 8, "--buffer-size", 700, "--eval-every", 200, "--eval-episodes", 2]


def small(total_timesteps: int, checkpoint_every: int = 50) -> list:
    return SMALL + ["--total-timesteps", total_timesteps, "--checkpoint-every", checkpoint_every]


# A small run of MAML or PEARL
TASKS = ["--primary-widths", 8, 16, "--dynamic-width", 8, "--horizon", 8, "--eval-episodes", 1]
TASKS += ["--num-test-goals", 2, "--num-train-goals", 4, "--meta-batch-size", 3]
MAML = [*TASKS, "--episodes-per-goal", 2]
PEARL = [*TASKS, "--num-initial-steps", 16, "--num-prior-steps", 8, "--num-posterior-steps", 8]
PEARL += ["--num-collect-goals", 2, "--num-train-steps", 4, "--batch-size", 8]


assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def assert_same_run(run_dir: Path, reference: Path, steps: int) -> None:
    """Both runs have the same eval.csv, summary, networks and TensorBoard scalars, bit for bit."""
    for name in ("eval.csv", "summary.json"):
        assert (run_dir / name).read_bytes() == (reference / name).read_bytes()
    weights = [torch.load(d / f"step_{steps}.pt", weights_only=True) for d in (run_dir, reference)]
    assert_equal(*weights)
    both = scalars(run_dir), scalars(reference)
    for values in both:  # of the speed only when it was measured can be the same
        values["charts/SPS"] = [(step, 0) for step, _ in values["charts/SPS"]]
    assert_equal(*both)


def assert_refused(finished: Finished, *words: str, code: int = 2) -> None:
    """The script ended with the exit code and with a message that holds the words."""
    assert finished.code == code, finished
    message = " ".join(finished.err.replace("│", " ").split())
    assert "Traceback" not in message
    for word in words:
        assert word in message, message


def files(folder: Path) -> dict[Path, bytes]:
    """The content of every file but the lock."""
    every = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {file: file.read_bytes() for file in every}


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every TensorBoard scalar, as TensorBoard shows them."""
    events = EventAccumulator(str(run_dir)).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def graph_of(loss: torch.Tensor) -> tuple[set[int], int]:
    """ids of the parameters that a backward pass reaches, and the number of its nodes."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    leaves = {id(node.variable) for node in seen if hasattr(node, "variable")}
    return leaves, len(seen)


def assert_close_in_bfloat16(losses, networks: list[torch.nn.Module]) -> None:
    """In bfloat16, losses(precision), each of its network, are within 2 % of those in float32 and
    their gradients have a cosine of at least 0.98; losses and gradients are float32 in both."""
    for loss, loss_16, network in zip(losses("float32"), losses("bfloat16"), networks):
        gradients = [torch.autograd.grad(x, [*network.parameters()]) for x in (loss, loss_16)]
        assert {x.dtype for x in (loss, loss_16, *gradients[0], *gradients[1])} == {torch.float32}
        flat = [torch.cat([x.flatten() for x in gradient]) for gradient in gradients]
        assert cosine(*flat) > 0.98 and not torch.equal(*flat)
        assert loss_16.item() == pytest.approx(loss.item(), rel=0.02)


def assert_same_weights(agent, expected, before) -> None:
    """All weights are the expected ones to float32's precision, and have moved much further."""
    for (name, new), reference in zip(agent.state_dict().items(), expected.state_dict().values()):
        torch.testing.assert_close(new, reference.float(), rtol=0, atol=1e-6, msg=name)
    for (name, new), old in zip(agent.named_children(), before.children()):
        pairs = zip(new.parameters(), old.parameters())
        assert max((p - q).abs().max() for p, q in pairs) > 1e-4, name


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).item()
