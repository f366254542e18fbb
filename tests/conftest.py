"""Running the scripts: in this process where that is enough, as a process of its own to kill it."""

import gc
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # pytest -n 2 has a process for each core
ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


@dataclass
class Finished:
    code: int
    out: str
    err: str


@pytest.fixture
def run_main(capfd, monkeypatch, tmp_path):
    """Run a script's main block in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tests")
    interrupt = signal.getsignal(signal.SIGINT)

    def run(script, *args: object) -> Finished:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        gc.collect()  # what the end of a process does: the run directory is unlocked
        return Finished(code, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGINT, interrupt)


def start(script, *args: object, **options) -> subprocess.Popen:
    """Start a script as a process of its own."""
    command = [sys.executable, str(script), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, **(pipes | options))
