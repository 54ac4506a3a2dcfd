"""Reward functions that misbehave as the response tells them; imported by worker processes, hence not a test module."""

import ctypes
import os
import re
import sys
import time

from dynamo_lightning.rewards import Reward


class Hoarder(Reward):
    """Keeps 100 MiB of every item in a cache."""

    cache = []  # noqa: RUF012

    def __call__(self, prompt, response, answer, **columns):
        self.cache.append(bytearray(100 * 2**20))
        return 1.0

    def free_memory(self):
        self.cache.clear()


def obey(prompt, response, answer):
    """Return the response as a number, unless it is one of the commands below."""
    match response.split():
        case ["sleep", seconds]:
            time.sleep(float(seconds))
            return 1.0
        case ["hold_gil"]:  # a pattern that backtracks for ages inside C code
            re.match(r"(a+)+$", "a" * 64 + "b")
        case ["raise"]:
            raise KeyError("no such unit")
        case ["raise_base_exception"]:
            raise KeyboardInterrupt
        case ["sys_exit"]:
            sys.exit(3)
        case ["os_exit"]:
            os._exit(7)
        case ["segfault"]:
            ctypes.string_at(0)
        case ["allocate"]:
            return float(len(bytearray(2 * 2**30)))
        case ["none"]:
            return None
        case ["pid"]:
            return float(os.getpid())
    return "seven" if response == "string" else float(response)


def append_line(prompt, response, answer):
    """Note in the file that the response names that it was scored."""
    with open(response, "a") as file:
        file.write("scored\n")
    return 1.0


def torch_is_imported(prompt, response, answer):
    return float("torch" in sys.modules)


def half(prompt, response, answer):
    return 0.5


def difficulty(prompt, response, answer, *, difficulty=0.0):
    return difficulty


def all_columns(prompt, response, answer, **columns):
    return float(sum(columns.values()))


def no_answer(prompt, response):
    return 0.0


not_a_function = 3
