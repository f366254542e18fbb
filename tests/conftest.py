"""Fixtures of all tests."""

import gc
import runpy
import signal
import sys

import pytest
import torch
from helpers import Finished

torch.set_num_threads(1)  # pytest -n 2 has a process for each core
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in background


@pytest.fixture
def run_main(capfd, monkeypatch, tmp_path):
    """Runs a script's main block in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGPIPE)}

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
    for name, handler in handlers.items():
        signal.signal(name, handler)
