"""train/sft.py that is lost to the other ranks at its fifth backward pass, if $LOSE says so:
by the signal of that name, or by sleeping before the next step (`sleep`).

With a signal the other ranks are inside DeepSpeed's reduction of the gradient.
"""

import os
import signal
import sys
import time

from train.engine import ZeroEngine
from train.sft import main

backward, step, calls = ZeroEngine.backward, ZeroEngine.step, []
lose = os.environ.get("LOSE")


def lost_or_backward(engine: ZeroEngine, loss) -> None:
    calls.append(loss)
    if lose and lose != "sleep" and len(calls) == 5:
        os.kill(os.getpid(), getattr(signal, lose))
    backward(engine, loss)


def step_and_sleep(engine: ZeroEngine, *args, **options):
    stepped = step(engine, *args, **options)
    if lose == "sleep" and len(calls) > 5:
        time.sleep(1000)
    return stepped


ZeroEngine.backward, ZeroEngine.step = lost_or_backward, step_and_sleep
sys.exit(main())
