"""train/sft.py whose ranks note in $NOTED that they index data: a script for torchrun."""

import os
import sys

import train.data
from train.sft import main

build = train.data.build_index


def note_and_build(*args, **options):
    with open(os.environ["NOTED"], "a", encoding="utf-8") as file:
        file.write(os.environ["RANK"] + "\n")
    return build(*args, **options)


train.data.build_index = note_and_build
sys.exit(main())
