"""Every critic trains, past its first updates, on every environment of the paper."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from hypernet import CRITICS

ANT = ["Ant-v4", "--env-kwargs", '{"ctrl_cost_weight": 0.005}']
ENVIRONMENTS = [["Hopper-v4"], ["Hopper-v5"], ["Walker2d-v4"], ["HalfCheetah-v4"], ANT]
# mlp-large and resnet35 have one size, the others are made small.
OPTIONS = ["--primary-widths", 8, 16, "--dynamic-width", 8, "--batch-size", 4]
OPTIONS += ["--total-timesteps", 26, "--learning-starts", 20, "--buffer-size", 100]
OPTIONS += ["--eval-every", 26, "--eval-episodes", 1]


@pytest.mark.parametrize("script", ["td3_hyper.py", "sac_hyper.py"])
@pytest.mark.parametrize("env", ENVIRONMENTS, ids=lambda env: env[0])
@pytest.mark.parametrize("critic", CRITICS)
def test_every_critic_trains_on_every_environment(run_main, script, env, critic):
    finished = run_main(ROOT / script, "--env-id", *env, "--critic", critic, *OPTIONS)
    assert finished.code == 0, finished.err
    (file,) = Path("runs").rglob("step_26.pt")
    assert (file.parent / "summary.json").exists()
    assert len((file.parent / "eval.csv").read_text().splitlines()) == 3
    weights = torch.load(file, weights_only=True)
    shutil.rmtree("runs")  # up to 140 MB
    for name in [name for name in weights if name.startswith("critics.")]:
        online, target = weights[name], weights[f"target_{name}"]
        assert online.isfinite().all()
        if name.endswith("weight") and online.numel() > 1:
            assert not torch.equal(online, target), name  # an update moved it
