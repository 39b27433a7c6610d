"""A watchdog bites when something takes much longer than it usually does, and only then."""

import os
import signal
import time

import pytest

from infra.distributed import largest_of_each
from infra.watchdog import KINDS, HangConfig, Watchdog, where_main_thread_is
from tests.ranks import run_ranks

QUICK = HangConfig(factor=4.0, least=0.5, first=60.0)


def test_what_takes_long_for_its_kind_is_a_hang():
    said: list[str] = []
    with Watchdog(QUICK, lambda why, allowed: said.append(why)) as watch:
        for _ in range(5):
            watch.doing("a step")
            time.sleep(0.01)
            watch.learn(watch.took())
        watch.doing("an evaluation")  # the first of its kind may take long
        time.sleep(0.8)
        assert said == []
        watch.doing("a step")
        time.sleep(1.2)
    assert len(said) == 1
    assert "in a step, which usually takes 0." in said[0]


def test_how_long_something_may_take_is_learnt():
    with Watchdog(HangConfig(factor=4.0, least=0.01, first=60.0), lambda why, allowed: None) as watch:
        assert watch.allowed("a step") == 60.0
        for _ in range(3):
            watch.doing("a step")
            time.sleep(0.1)
        watch.doing("a checkpoint")
        assert watch.allowed("a step") == 60.0
        watch.learn(watch.took())
        assert watch.allowed("a step") >= 0.4
        watch._usual["a step"].extend([1.0] * 32)  # what was longer ago than this is forgotten
        assert watch.allowed("a step") == 4.0
        assert watch.allowed("a step", on_disk=True) == 60.0


def _allowed(rank: int, world_size: int) -> list[float]:
    watch = Watchdog(HangConfig(factor=100.0, least=0.01, first=60.0), lambda why, allowed: None)
    for _ in range(3):
        watch.doing("a step")
        time.sleep(0.01 + 0.05 * rank)
        watch.doing("an evaluation" if rank == 0 else "a checkpoint")
        time.sleep(0.01)
        watch.learn(largest_of_each(watch.took()))
    return [watch.allowed(kind) for kind in KINDS]


def test_all_ranks_have_the_patience_of_the_slowest() -> None:
    first, second = run_ranks(2, _allowed)
    assert first == second
    assert first[0] >= 6.0
    assert first[1] < 60.0
    assert first[3] == 60.0, "what nobody has done"


def test_zero_turns_it_off():
    said: list[str] = []
    with Watchdog(HangConfig(factor=0.0, least=0.05, first=0.05), lambda why, allowed: said.append(why)):
        time.sleep(0.3)
    assert said == []


def test_a_process_that_was_stopped_as_a_whole_has_not_hung():
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        with Watchdog(HangConfig(factor=4.0, least=1.0, first=1.0), lambda why, allowed: os._exit(1)):
            os.write(write, b"ready")
            time.sleep(0.6)
        os._exit(0)
    os.read(read, 5)
    os.kill(child, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_it_can_say_where_the_main_thread_is():
    assert "test_watchdog.py" in where_main_thread_is()
    assert "test_it_can_say" in where_main_thread_is()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"hang.factor=-1"):
        HangConfig(factor=-1)
