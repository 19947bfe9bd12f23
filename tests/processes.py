"""Commands of the package in processes of their own, one or torchrun's two."""

import os
import subprocess
import sys


def start(argv, **more):
    run = [sys.executable, "-m", *argv]
    return subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def torchrun(argv):
    """Two processes, each begun anew up to twice where one is lost."""
    own = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2", "-m", *argv]
    return start(own, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def ranks_of(started):
    """The numbers of torchrun's processes."""
    listed = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]
