"""Runs functions in several processes that know of each other, as a launcher would start them.

They are forked from a process that has imported everything already: an import takes longer than these tests do.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback

PRELOADED = ["dynamo_lightning.cli", "dynamo_lightning.callbacks", "transformers.models.qwen3.modeling_qwen3"]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _enter(function, arguments, environment, folder, output):
    """What a process does."""
    os.chdir(folder)
    os.environ.update(environment)
    with open(output, "w", buffering=1) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        sys.stdout = sys.stderr = log
        import torch
        from lightning.pytorch.utilities.rank_zero import rank_zero_only

        torch.set_num_threads(1)
        rank_zero_only.rank = int(environment.get("LOCAL_RANK", "0"))
        try:
            function(*arguments)
            code = 0
        except SystemExit as end:  # with a message or a number, as the interpreter takes it
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            print(end.code or "")
        except BaseException:
            traceback.print_exc()
            code = 1
    os._exit(code)  # without waiting for what others may wait for


def start(function, arguments, num_processes=1, folder="."):
    """Start the processes; their output goes to `output-{rank}.txt`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_processes)}
    processes = []
    for rank in range(num_processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        environment = common | ranks if num_processes > 1 else {}
        process = context.Process(
            target=_enter, args=(function, arguments, environment, str(folder), f"output-{rank}.txt")
        )
        process.start()
        processes.append(process)
    return processes


def finish(processes, timeout=120.0):
    """Wait for all; their exit codes. What still runs at the time limit is killed."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {len(processes)} processes still ran after {timeout:.0f} s"
    return [process.exitcode for process in processes]


def run(function, arguments, num_processes=1, folder=".", timeout=120.0):
    """Run the processes to their end."""
    codes = finish(start(function, arguments, num_processes, folder), timeout)
    if any(codes):
        logs = "\n".join(open(os.path.join(folder, f"output-{rank}.txt")).read() for rank in range(num_processes))
        raise AssertionError(f"exit codes {codes}\n{logs[-6000:]}")


def command_line(arguments):
    """What `python -m dynamo_lightning` does."""
    from dynamo_lightning.cli import main

    main(arguments)
