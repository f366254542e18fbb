"""python kill_in_checkpoint.py MOMENT SCRIPT ARGS...: SIGKILL while a checkpoint is written.

MOMENT is half (of the file is written) or the number of the rename before which it dies, 1 to 3.
"""

import io
import os
import runpy
import signal
import sys

import torch

moment, sys.argv = sys.argv[1], sys.argv[2:]
save, replace, renames = torch.save, os.replace, 0


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save_half(state, stream):
    if moment == "half" and "checkpoint" in stream.name:
        whole = io.BytesIO()
        save(state, whole)
        stream.write(whole.getvalue()[: whole.tell() // 2])
        stream.flush()
        die()
    save(state, stream)


def replace_counted(source, target):
    global renames
    if "checkpoint" in str(source):
        renames += 1
        if moment == str(renames):
            die()
    replace(source, target)


torch.save, os.replace = save_half, replace_counted
runpy.run_path(sys.argv[0], run_name="__main__")
