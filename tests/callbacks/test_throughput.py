import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynamo_lightning.callbacks import ThroughputMonitor
from dynamo_lightning.callbacks.throughput import peak_memory


def test_throughput_is_tokens_over_seconds_of_the_whole_iteration(train, make_record):
    def script(iteration):
        time.sleep(0.05)
        return replace(make_record(iteration), num_tokens=[100, 300][iteration])

    logged = train([ThroughputMonitor()], script=script, epoch_length=2).logged
    for tokens, rate, seconds in zip(
        [100, 300], logged["perf/throughput"], logged["perf/iteration_seconds"], strict=True
    ):
        assert seconds >= 0.05
        assert rate == pytest.approx(tokens / seconds, rel=1e-4)
    assert logged["perf/total_num_tokens"] == [100, 400]


def test_tokens_are_counted_over_resumptions():
    monitor = ThroughputMonitor()
    monitor.total_num_tokens = 7
    resumed = ThroughputMonitor()
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.total_num_tokens == 7


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells by other means")
def test_peak_memory_is_the_resident_high_water_mark_in_gigabytes():
    status = Path("/proc/self/status").read_text()
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
    assert peak_memory(torch.device("cpu")) == pytest.approx(kibibytes * 1024 / 1e9, rel=0.05)
