"""Agents learn to park a cart, mostly within 600 updates; a slow one may take more."""

import csv
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

# Random actions return about -270, none at all -150, a good controller -0.5.
SOLVED = -10
OPTIONS = ["--env-id", "toy_envs:Cart-v0", "--learning-starts", 200]
OPTIONS += ["--eval-every", 200, "--eval-episodes", 10, "--batch-size", 64]
OPTIONS += ["--gamma", 0.9, "--tau", 0.02, "--actor-lr", 1e-3, "--critic-lr", 1e-3]
OPTIONS += ["--primary-widths", 16, 32, "--dynamic-width", 32, "--total-timesteps"]


@pytest.mark.parametrize(
    "script, own",
    [("td3_hyper", ["--exploration-noise", 0.2]), ("sac_hyper", ["--alpha-lr", 1e-3])],
)
def test_agent_parks_the_cart(run_main, script, own):
    for steps in (800, 1200, 1600, 2000, 2400):  # each goes on where the last one ended
        finished = run_main(ROOT / f"{script}.py", *own, *OPTIONS, steps)
        assert finished.code == 0, finished.err
        (file,) = Path("runs").rglob("eval.csv")
        with open(file) as stream:
            returns = [float(row["return"]) for row in csv.DictReader(stream)]
        best = np.reshape(returns, (-1, 10)).mean(1).max()
        if best > SOLVED:
            break
    assert best > SOLVED
