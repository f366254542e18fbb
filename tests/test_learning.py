"""Agents learn to park a cart within 600 updates."""

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

# Random actions return about -270, none at all -150, a good controller -0.5.
SOLVED = -10
OPTIONS = ["--env-id", "toy_envs:Cart-v0", "--total-timesteps", 800, "--learning-starts", 200]
OPTIONS += ["--eval-every", 200, "--eval-episodes", 10, "--batch-size", 64]
OPTIONS += ["--gamma", 0.9, "--tau", 0.02, "--actor-lr", 1e-3, "--critic-lr", 1e-3]
OPTIONS += ["--primary-widths", 16, 32, "--dynamic-width", 32]


def best_return(run_main, script: Path, critic: str) -> float:
    """Mean return of the best evaluation."""
    own = ["--alpha-lr", 1e-3] if script.name == "sac_hyper.py" else ["--exploration-noise", 0.2]
    finished = run_main(script, *OPTIONS, *own, "--critic", critic)
    assert finished.code == 0, finished.err
    (file,) = Path("runs").rglob("eval.csv")
    with open(file) as stream:
        returns = [float(row["return"]) for row in csv.DictReader(stream)]
    return np.reshape(returns, (5, 10)).mean(1).max()


@pytest.mark.parametrize("critic", ["mlp", "sa-hyper"])
@pytest.mark.parametrize("script", ["td3_hyper.py", "sac_hyper.py"])
def test_agent_parks_the_cart(run_main, script, critic):
    assert best_return(run_main, ROOT / script, critic) > SOLVED
