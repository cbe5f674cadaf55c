#!/usr/bin/python3
"""/usr/lib/dsnat/agent leads here. Started as a file, so it says first which package it belongs to."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    here = Path(__file__).resolve().parent
    sys.path[0] = str(here.parent)
    __package__ = here.name

from .command import main

sys.exit(main())
