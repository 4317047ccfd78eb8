"""train/sft.py that is killed while it writes checkpoint-$KILL_AT: a script for torchrun.

The moment is the worst one: the fragments are on the disk, the model is not.
"""

import os
import signal
import sys
from pathlib import Path

import train.snapshot
from train.sft import main

write = train.snapshot.save_model


def die_or_write(folder: Path, *args) -> None:
    if folder.parent.name.startswith(f"checkpoint-{os.environ['KILL_AT']}."):
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, *args)


train.snapshot.save_model = die_or_write
sys.exit(main())
