"""Real measurements of tiny cases in processes of their own: what is recorded, never how long it took."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from physformer_core.benchmark.campaign import Campaign, run_campaign, sizes_from
from physformer_core.benchmark.cases import OURS, Case
from physformer_core.benchmark.machine import MachinePeak
from physformer_core.benchmark.measure import (
    Measurement,
    extrapolated,
    find_batch_size,
    fits,
    measure_together,
)
from physformer_core.benchmark.workers import OutOfMemory, Worker
from physformer_core.errors import ConfigError, DeviceError


def case(contender: str = OURS, tokens: int = 256, **more) -> Case:
    side = round(tokens**0.5)
    given = {"what": "model", "preset": "debug", "device": "cpu", "dtype": "fp32", **more}
    return Case(contender=contender, height=side, width=side, **given)


def measured(contender: str, tokens: int, seconds: float) -> Measurement:
    return Measurement(
        case=case(contender, tokens), status="measured", samples=(seconds,), seconds=seconds, peak_bytes=1000 * tokens
    )


def test_a_round_measures_everybody() -> None:
    seen = []
    cases = [case(), case("sana")]
    ours, sana = measure_together(cases, repeats=2, on_run=lambda one: seen.append(one.contender))
    assert seen == [OURS, "sana"] * 3  # by turns, the first round to warm up
    for one in (ours, sana):
        assert one.status == "measured" and len(one.samples) == 2
        assert one.seconds and one.seconds > 0 and one.spread is not None
        assert one.flops and one.bytes and one.parameters and one.process_bytes
    assert ours.flops != sana.flops


def test_what_is_slow_runs_once() -> None:
    [one] = measure_together([case()], repeats=5, slow_seconds=0.0)
    assert len(one.samples) == 1 and one.note


def test_larger_fields_need_more_memory() -> None:
    small, large = (measure_together([case(tokens=tokens)], repeats=1)[0] for tokens in (256, 4096))
    assert small.peak_bytes is not None and large.peak_bytes is not None
    assert large.peak_bytes > small.peak_bytes


def test_a_worker_without_memory_says_so() -> None:
    with pytest.raises(OutOfMemory), Worker(case(tokens=256 * 256), memory_limit=2**28) as worker:
        worker.run()


def test_a_fault_in_a_worker_is_no_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="TypeError") as caught:
        Worker(case(batch="four"))  # type: ignore[arg-type]
    assert not isinstance(caught.value, DeviceError) and "Traceback" in caught.value.__notes__[0]


def test_a_worker_that_is_ended_ran_out_of_memory() -> None:
    with Worker(case()) as worker:
        os.kill(worker._process.pid, signal.SIGINT)  # Ctrl-C is the parent's to answer
        worker.run()
        worker._process.kill()
        with pytest.raises(OutOfMemory, match="was ended by signal 9"):
            worker.run()


def test_a_case_that_cannot_be_built_is_the_users_fault() -> None:
    with pytest.raises(ConfigError, match="unknown preset"):
        Worker(case(preset="none"))
    with pytest.raises(ConfigError, match="no peer 'x'"):
        run_campaign(Campaign(what="model", sizes=((8, 8),), peers=("x",), preset="debug"))


def test_extrapolation_follows_the_contenders_own_fit() -> None:
    done = [measured("dense", n, 1e-9 * n**2) for n in (1024, 4096, 16384)]
    done += [measured(OURS, n, 1e-6 * n) for n in (1024, 4096, 16384)]
    predicted = extrapolated(case("dense", 65536), done)
    assert predicted.status == "extrapolated" and predicted.seconds == pytest.approx(1e-9 * 65536**2)
    assert predicted.peak_bytes is None and "up to 16,384" in predicted.note
    alone = extrapolated(case("global", 65536), done)
    assert (alone.status, alone.seconds) == ("not run", None) and "fewer than two smaller sizes" in alone.note
    laws = fits([*done, predicted])
    assert laws[("dense", 1, "fp32")]["time"].exponent == pytest.approx(2)
    assert laws[(OURS, 1, "fp32")]["memory"].exponent == pytest.approx(1)


def test_largest_batch_is_the_last_that_fits() -> None:
    one = measure_together([case(tokens=1024)], repeats=1)[0]
    two = measure_together([case(tokens=1024, batch=3)], repeats=1)[0]
    assert one.peak_bytes and two.peak_bytes
    limit = (one.peak_bytes + two.peak_bytes) // 2
    tries: list[int] = []
    found = find_batch_size(case(tokens=1024), limit_bytes=limit, most=8, on_try=tries.append)
    assert found.batch in (1, 2) and found.peak_bytes <= limit
    assert dict(found.tried)[found.batch] and not dict(found.tried)[found.batch + 1]
    assert sorted(tries) == [batch for batch, _ in found.tried]


def test_nothing_fits_into_nothing() -> None:
    with pytest.raises(DeviceError, match="not even one"):
        find_batch_size(case(tokens=4096), limit_bytes=1000)
    with pytest.raises(ConfigError, match="leaves no room"):
        find_batch_size(case(), limit_bytes=0)


def test_products_that_would_take_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def slow(one: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> None:
        sizes.append(one.shape[0])
        time.sleep(0.01)  # 256 cubed in that time are 3.4 GFLOP/s: the next one would take 0.6 s

    monkeypatch.setattr(torch, "mm", slow)
    peak = MachinePeak(torch.device("cpu"), torch.float32)
    peak.observe(0.0)
    assert set(sizes) == {256} and 1e9 < peak.flops < 4e9


def test_peaks_only_grow() -> None:
    peak = MachinePeak(torch.device("cpu"), torch.float32)
    peak.observe(0.0)
    first = (peak.flops, peak.bandwidth)
    peak.observe(0.0)
    assert peak.flops >= first[0] > 0 and peak.bandwidth >= first[1] > 0


def test_sizes() -> None:
    assert sizes_from(res=["720p", "512x256"], patch=8) == ((90, 160), (32, 64))
    assert sizes_from(res=["100x100"], patch=8) == ((13, 13),)
    with pytest.raises(ConfigError, match="twice"):
        sizes_from(res=["720p"], tokens=[100])
    with pytest.raises(ConfigError, match="too small"):
        sizes_from(tokens=[10])
