"""Ranks are killed at random, at random moments, half of them inside a save: the run ends as if nothing had happened.

Small by default, on forked ranks that this test starts again. `--slow` adds a run under `torchrun --max-restarts`,
which starts them again by itself. `--nightly` makes both 300 steps long, and kills 20 times.
"""

import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from infra import checkpoint, incidents
from infra.metrics import FILE, read_records
from tests.launch.runs import TIMES, config, in_folder, run_fit, small_data
from tests.launch.test_pretrain_cli import ROOT, command
from tests.parallel.layouts import tiny
from tests.ranks import run_ranks

RANKS = 2


class Killer:
    """Kills one of the processes of a run, again and again, at random moments of each kind in turn.

    kills: in which kind of moment each was. longest: seconds after the start, or after the first step, to choose from.
    """

    KINDS = ("in a save", "in a step", "in a save", "at the start")

    def __init__(self, run: Path, seed: int, num_kills: int, longest: float):
        self.run, self.rng, self.left, self.longest = run, random.Random(seed), num_kills, longest
        self.kills: list[str] = []
        self._last = 0.0  # kill; what is half-written from before it is nobody's save any more

    def strike(self, pids: Callable[[], Sequence[int]]) -> bool:
        """Waits for the moment and kills; False where the run was over before."""
        kind = self.KINDS[len(self.kills) % len(self.KINDS)]
        after = self.rng.uniform(0, self.longest)
        began = time.monotonic() if kind == "at the start" else None
        while not (self._is_inside_a_save() if kind == "in a save" else began and time.monotonic() > began + after):
            if not pids():
                return False
            if began is None and self._is_newer(self.run / FILE):
                began = time.monotonic()
            time.sleep(0.0005)
        if victims := pids():
            self.kills.append(kind)
            os.kill(self.rng.choice(victims), signal.SIGKILL)
            self._last = time.time()
            self.left -= 1
        return bool(victims)

    def _is_inside_a_save(self) -> bool:
        """At some moment of one, not just at its beginning."""
        if self._is_saving():
            time.sleep(self.rng.uniform(0, 0.005))
        return self._is_saving()

    def _is_saving(self) -> bool:
        """Not the first one: a run without a checkpoint would have nothing to go on from."""
        folder = self.run / "checkpoints"
        return any(map(self._is_newer, folder.glob(".step_*.writing"))) and any(folder.glob("step_*"))

    def _is_newer(self, file: Path) -> bool:
        try:
            return file.stat().st_mtime > self._last
        except FileNotFoundError:  # not yet, or not any more
            return False


def assert_same_run(broken: Path, unbroken: Path) -> None:
    """The same numbers in every step, and the same bits in the last checkpoint."""
    numbers = [
        [{key: value for key, value in record.items() if key not in TIMES} for record in read_records(folder)]
        for folder in (broken, unbroken)
    ]
    assert numbers[0] == numbers[1]
    ours, expected = (next(checkpoint.whole(folder / "checkpoints")) for folder in (broken, unbroken))
    assert ours.meta == expected.meta
    assert ours.keys == expected.keys
    want = expected.read(expected.keys)
    for key, tensor in ours.read(ours.keys).items():
        assert torch.equal(tensor, want[key]), key


def _rank(rank: int, settings, store: Path) -> None:
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = store.with_suffix(f".{rank}.log").open("w")
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=dist.FileStore(str(store), RANKS))
    run_fit(rank, RANKS, settings)
    dist.destroy_process_group()


def _alive(ranks: Sequence) -> list[int]:
    return [process.pid for process in ranks if process.is_alive()]


@pytest.mark.timeout(1200)
def test_forked_ranks_that_are_killed_and_started_again(tmp_path, request):
    steps, num_kills, longest = (300, 20, 4.0) if request.config.getoption("--nightly") else (16, 3, 1.0)
    model = tiny(num_hidden_layers=2, num_nextn_predict_layers=0, vocab_size=320, initializer_range=0.1)
    settings = config(small_data(tmp_path), model=model, steps=steps, precision="fp32", pp=2, schedule="dualpipe")
    run_ranks(RANKS, run_fit, in_folder(settings, tmp_path / "unbroken"), timeout=600)
    settings = in_folder(settings, tmp_path / "broken", every=2)
    killer = Killer(tmp_path / "broken", 1, num_kills, longest)
    context = mp.get_context("fork")
    for attempt in range(2 * num_kills + 1):
        ranks = [
            context.Process(target=_rank, args=(rank, settings, tmp_path / f"store_{attempt}")) for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        try:
            struck = killer.left and killer.strike(partial(_alive, ranks))
            for process in ranks:  # of which one may wait for a peer that was killed before they had met
                process.join(5 if struck else 600)
            codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()
        if codes == [0] * RANKS:
            break
    else:
        raise AssertionError(f"the run came to no end; kills: {killer.kills}")
    assert len(killer.kills) == num_kills
    print(f"{len(killer.kills)} kills, {killer.kills.count('in a save')} of them in a save")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")


def _workers(launcher: subprocess.Popen) -> list[int]:
    """The ranks that torchrun has started."""
    try:
        return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_torchrun_starts_killed_ranks_again_by_itself(tmp_path, request):
    nightly = request.config.getoption("--nightly")
    steps, num_kills, longest = (300, 20, 4.0) if nightly else (40, 3, 1.0)
    options = [f"data.path={small_data(tmp_path)}", "parallel.pp=2", "precision=fp32", f"train.steps={steps}"]
    options += ["checkpoint.every=2", "run.trace=false"]
    unbroken = command(*options, f"run.dir={tmp_path / 'unbroken'}", ranks=RANKS)
    subprocess.run(unbroken, check=True, cwd=ROOT, capture_output=True)
    started = command(*options, f"run.dir={tmp_path / 'broken'}", ranks=RANKS)
    started.insert(started.index("--standalone"), f"--max-restarts={num_kills}")
    killer = Killer(tmp_path / "broken", 2, num_kills, longest)
    log = tmp_path / "log"
    with log.open("w") as said:
        launcher = subprocess.Popen(started, stdout=said, stderr=said, cwd=ROOT)
        try:
            while killer.left and launcher.poll() is None:
                before = set(_workers(launcher))
                if killer.strike(partial(_workers, launcher)):
                    while before & set(_workers(launcher)) and launcher.poll() is None:
                        time.sleep(0.01)  # until torchrun has ended the others as well
            assert launcher.wait(timeout=1800) == 0, log.read_text()[-3000:]
        finally:
            launcher.terminate()  # it then ends its ranks
            launcher.wait(timeout=60)
    print(f"{len(killer.kills)} kills, {killer.kills.count('in a save')} of them in a save")
    assert len(killer.kills) == num_kills, "the run was over before all kills: nothing was lost, but too little tried"
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    kinds = [incident["kind"] for incident in incidents.read(tmp_path / "broken")]
    assert 0 < kinds.count("resumed") <= num_kills
