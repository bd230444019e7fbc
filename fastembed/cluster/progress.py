"""How far a submission is that we attend to the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """How many tasks there are, have ended (the failed ones too), have failed, and run now."""

    total: int
    done: int
    failed: int
    running: int


Progress = Callable[[Standing], None]
