"""Runs a command for a limited time, with everything it starts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

GRACE = 10.0  # seconds between asking a process to end and ending it


def run(
    command: Sequence[str | Path],
    seconds: float,
    cwd: Path,
    variables: Mapping[str, str] | None = None,
    output: IO[Any] | None = None,
) -> int | None:
    """The exit status; None where the time was up. `variables` are added to the environment.

    `output` receives what it prints (default: this process's own). After that time, or when this process is
    interrupted, the command is ended with the processes it has started; one that the system does not let go is left.
    """
    process = subprocess.Popen(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **(variables or {})}, stdout=output,
        stderr=subprocess.STDOUT if output else None, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of the process's group."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(timeout=GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
