"""Training on a GPU; skipped where there is none."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import MAML, PEARL, ROOT, assert_equal, assert_same_run, small

import sac_hyper
import td3_hyper
from hypernet import CudaGraph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
OBS, ACTION, B = 17, 6, 100


def prepare(script, **options):
    """An agent and its optimizers on the GPU, from the same seed each time, and 12 batches."""
    args = script.Args(device="cuda", **options)
    torch.manual_seed(1)
    agent = script.Agent(OBS, ACTION, args).cuda()
    parts = {"critic": agent.critics.parameters(), "actor": agent.actor.parameters()}
    if script is sac_hyper:
        parts["alpha"] = [agent.log_alpha]
    adam = {n: torch.optim.Adam(p, 1e-4, fused=True, capturable=True) for n, p in parts.items()}
    batches = []
    for _ in range(12):
        obs, next_obs = torch.randn(2, B, OBS, device="cuda")
        action = torch.rand(B, ACTION, device="cuda") * 2 - 1
        terminated = torch.zeros(B, device="cuda")
        batch = script.Batch(obs, action, obs[:, 0].clone(), next_obs, terminated)
        batches.append((batch, torch.randn(B, ACTION, device="cuda")))
    return args, agent, adam, batches


def updates_of(script, args, agent, adam) -> list:
    """Functions of batch and noise; TD3's actor needs no noise."""
    critics = partial(script.update_critics, agent, adam, args=args)
    actor = partial(script.update_actor_and_targets, agent, adam, args=args)
    return [critics, actor if script is sac_hyper else lambda batch, noise: actor(batch)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("critic", ["mlp", "sa-hyper"])
@pytest.mark.parametrize("script", [td3_hyper, sac_hyper])
def test_a_cuda_graph_makes_the_same_updates_bit_for_bit(script, critic, precision):
    results = []
    for wrap in (lambda function: function, CudaGraph):
        args, agent, adam, batches = prepare(script, critic=critic, precision=precision)
        learn = [wrap(function) for function in updates_of(script, args, agent, adam)]
        losses = [
            {name: loss.item() for function in learn for name, loss in function(*batch).items()}
            for batch in batches
        ]
        results.append((losses, agent.state_dict()))
    assert_equal(results[0][0], results[1][0])
    assert_equal(dict(results[0][1]), dict(results[1][1]))


@pytest.mark.parametrize(
    "name, args, total, columns",
    [
        ("td3_hyper", small(0)[:-4], "--total-timesteps", (250, 400)),
        ("td3_hyper", [*small(0)[:-4], "--cuda-graph"], "--total-timesteps", (250, 400)),
        ("sac_hyper", [*small(0)[:-4], "--cuda-graph"], "--total-timesteps", (250, 400)),
        ("maml_hyper", MAML, "--num-iterations", (2, 4)),
        ("pearl_hyper", [*PEARL, "--cuda-graph"], "--num-iterations", (2, 4)),
    ],
)
def test_every_script_resumes_bit_for_bit_on_a_gpu(run_main, name, args, total, columns):
    script, (half, whole) = ROOT / f"{name}.py", columns
    args = [*args, "--checkpoint-every", 1, "--device", "cuda"]
    for steps, folder in ((half, "resumed"), (whole, "resumed"), (whole, "whole")):
        finished = run_main(script, *args, total, steps, "--runs-dir", folder)
        assert finished.code == 0, finished.err
    (resumed,) = Path("resumed").glob("*/*/*/seed1")
    assert_same_run(resumed, Path("whole", *resumed.parts[1:]), whole)
