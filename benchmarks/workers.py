"""Processes of one thread each that a benchmark's work is mapped over."""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


def quiet() -> None:
    """One thread for each process; no chatter."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def workers(num_processes: int) -> Iterator[Callable[..., Any]]:
    """A map over so many processes; results do not depend on their number."""
    if num_processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    pool: Executor
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        yield pool.map
