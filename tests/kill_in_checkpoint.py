"""python kill_in_checkpoint.py N SCRIPT ARGS...: SIGKILL before the Nth rename of a checkpoint."""

import os
import runpy
import signal
import sys

remaining, sys.argv = int(sys.argv[1]), sys.argv[2:]
replace = os.replace


def replace_or_die(source, target):
    global remaining
    remaining -= "checkpoint" in str(source)
    if remaining == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)


os.replace = replace_or_die
runpy.run_path(sys.argv[0], run_name="__main__")
