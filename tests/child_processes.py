"""Processes that a test starts and waits for."""

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest


def ended(process, seconds: float = 60) -> int:
    """Exit code of a process that has to end by itself."""
    process.join(seconds)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        pytest.fail("the process did not end")
    return process.exitcode


def run_on_two(processes, function: Callable[[Any, dict[str, str]], None], arguments: Any):
    """
    Runs a function on two processes of this machine, which talk by gloo, to their end.

    Args:
        processes: the fixture.
        function: given the arguments and the environment that it has to set; makes itself the leader of a group.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    pair = []
    for rank in range(2):
        settings = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pair.append(processes.Process(target=function, args=(arguments, settings), daemon=True))
        pair[-1].start()
    assert [ended(process) for process in pair] == [0, 0]
