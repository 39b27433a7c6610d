"""One rank of a pipeline fails: all others end soon after it, each with one line; the cause with its trace and grid."""

import json
import multiprocessing as mp
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from multiprocessing.util import Finalize

import torch
import torch.distributed as dist

from launch.errors import SECONDS_FOR_RANK_0, one_line_errors
from parallel.pipeline.executor import Executor
from parallel.pipeline.p2p import P2P, Spec
from parallel.pipeline.passes import lower
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.synthetic import SyntheticStage

CPU = torch.device("cpu")
FAILING = 3


class Stage(SyntheticStage):
    """2 ms an action; the backward of its microbatch `fails_at` is not to be."""

    def __init__(self, fails_at=None):
        super().__init__(0.002, 0.002, 0.002, Spec((4, 8), torch.float64), CPU)
        self.fails_at = fails_at

    def backward(self, mb, grad, split):
        if mb == self.fails_at:
            raise KeyError("a bug in the model")
        return super().backward(mb, grad, split)


def _rank(rank, world, name, fails_at, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "TORCHELASTIC_ERROR_FILE": str(folder / f"{rank}.json")}
    sys.stderr = (folder / f"{rank}.err").open("w", buffering=1)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(str(folder / "store"), world))
    schedule = SCHEDULES[name](world, 2 * world)
    stages = {s: Stage(fails_at if rank == FAILING else None) for s in schedule.stages_of(rank)}
    p2p = P2P(range(world), rank, dist.new_group(), dist.new_group(), CPU)
    executor = Executor(schedule, lower(schedule).programs[rank], rank, stages, p2p)
    Finalize(None, time.sleep, args=(1,), exitpriority=0)  # stands for an interpreter that takes a second to clear up
    with one_line_errors(), one_line_errors():
        while True:
            executor.step()
            (folder / f"{rank}.began").touch()


@contextmanager
def running(world, name, folder, fails_at=None):
    context = mp.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, world, name, fails_at, folder)) for rank in range(world)]
    for process in ranks:
        process.start()
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


def seconds_to_end(ranks):
    began = time.monotonic()
    for process in ranks:
        process.join(max(0.0, began + 60 - time.monotonic()))
    return time.monotonic() - began


def test_a_killed_rank_ends_all_others_at_once(tmp_path):
    """In a pipeline news travels from neighbour to neighbour: a rank that lingered would keep it from the next."""
    world = 8
    with running(world, "dualpipe", tmp_path) as ranks:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"{rank}.began").exists() for rank in range(world)):
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)
        os.kill(ranks[-1].pid, signal.SIGKILL)
        took = seconds_to_end(ranks)
        codes = [process.exitcode for process in ranks]
    assert codes == [1] * (world - 1) + [-signal.SIGKILL]
    assert took < SECONDS_FOR_RANK_0, f"{took:.1f} s"
    print(f"all {world} ranks had ended {took:.2f} s after the kill")
    for rank in range(world - 1):
        said = (tmp_path / f"{rank}.err").read_text()
        place = rf"world rank {rank} ends: dualpipe: rank {rank}, slot \d+: "
        line = place + r".*lost rank \d[ ,].*: (Connection .*|Broken pipe)\n"
        line += rf"rank {rank} .*\[\S+\].*\n"
        assert re.fullmatch(line, said), said


def test_a_bug_in_a_stage_keeps_its_trace_and_its_grid(tmp_path):
    with running(4, "1f1b", tmp_path, fails_at=2) as ranks:
        seconds_to_end(ranks)
        took = time.time() - (tmp_path / f"{FAILING}.err").stat().st_mtime
        assert [process.exitcode for process in ranks] == [1] * 4
    assert took < SECONDS_FOR_RANK_0, f"{took:.1f} s"
    said = [(tmp_path / f"{rank}.err").read_text() for rank in range(4)]
    trace, _, shown = said[FAILING].partition("error: ")
    assert re.match(r"world rank 3: 1f1b: rank 3, slot 5: KeyError: 'a bug in the model'\nslots 0 to 9\n", shown), shown
    assert "[3B2]" in shown
    assert re.search(r'raise KeyError\("a bug in the model"\)\nKeyError: ', trace), trace
    told = [json.loads((tmp_path / f"{rank}.json").read_text())["message"] for rank in range(4)]
    assert told[FAILING]["message"] == "1f1b: rank 3, slot 5: KeyError: 'a bug in the model'"
    assert min(told, key=lambda report: report["extraInfo"]["timestamp"]) is told[FAILING], (
        "torchrun takes the earliest for the cause"
    )
    for rank in range(3):
        assert re.fullmatch(
            rf"world rank {rank} ends: [^\n]* lost rank \d[^\n]*\nrank {rank} [^\n]*\[\S+\][^\n]*\n", said[rank]
        ), said[rank]
