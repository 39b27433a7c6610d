"""The rank that the others wait for, from spans and from runs in which one rank sleeps."""

import time
from dataclasses import replace

import pytest
import torch

from infra.distributed import World
from launch.trainer import Trainer
from launch.waits import FOR_LONG, Waits
from parallel.pipeline.actions import Action, Op
from parallel.pipeline.timeline import Span
from parallel.straggler import PHASES, own_times, straggler
from tests.launch.runs import config, small_data
from tests.parallel.layouts import tiny
from tests.ranks import run_ranks


def test_own_times_are_spans_without_what_was_waited_for_inside():
    spans = [
        Span(0, 0, Action(0, Op.F, 0), 0.0, 3.0, 3.0),
        Span(0, 1, Action(0, Op.F, 1), 3.0, 7.0, 6.0),
        Span(0, 1, Action(0, Op.B, 0), 3.0, 7.0, 7.0),  # a pair: both carry its times
        Span(0, 2, Action(0, Op.B, 1), 8.0, 13.0, 10.0),
        Span(0, 3, Action(0, Op.I, 2), 13.0, 14.0, 14.0),
        Span(0, 4, Action(0, Op.W, 2), 14.0, 20.0, 20.0),
    ]
    waits = [(1.0, 2.0), (6.5, 8.5), (9.5, 10.5)]
    assert own_times(spans, waits, load=0.5, update=0.25) == pytest.approx(
        {"load": 0.5, "forward": 2.0, "backward": 1.0 + 1.0, "weight_grad": 2.5 + 6.0, "pair": 3.5, "update": 0.25}
    )


def test_the_straggler_has_most_of_its_own_to_do():
    own_RP = torch.tensor([[0.0, 1, 2, 3, 0, 0], [0.0, 1, 2, 3, 0, 0], [0.0, 5, 1, 3, 0, 0]], dtype=torch.float64)
    figures = straggler(own_RP)
    assert (figures["straggler_rank"], figures["straggler_wait"]) == (2, 3.0)
    assert [figures[f"straggler_wait_{phase}"] for phase in PHASES] == [0, 4, -1, 0, 0, 0]
    assert straggler(own_RP[:1])["straggler_wait"] == 0


SLEPT = 0.8  # seconds of a step, by one rank: much more than any computes


def _sleep_in_forward(rank, world_size, config, sleeper, seconds):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    if rank == sleeper:
        for stage in trainer.replica.stages.values():
            stage.forward = _slowed(stage.forward, seconds)
    return [trainer.train_step()[0] for _ in range(3)][1:]


def _slowed(forward, seconds):
    def slow(mb, x):
        time.sleep(seconds)
        return (yield from forward(mb, x))

    return slow


@pytest.mark.parametrize(
    ("parallel", "forwards", "sleeper"),
    [
        pytest.param({"pp": 4, "schedule": "1f1b"}, 8, 1, marks=pytest.mark.slow),
        pytest.param({"ep": 2, "dispatcher": "two_hop", "ranks_per_node": 2}, 2, 3, marks=pytest.mark.slow),
        ({"pp": 2, "ep": 2, "schedule": "dualpipe", "dispatcher": "all_to_all"}, 8, 2),
    ],
)
def test_a_rank_that_sleeps_in_its_forward_is_named(tmp_path, parallel, forwards, sleeper):
    """In whichever group it stands: pipeline, experts or data parallel. The pairs of DualPipe hold forwards too.

    In one step of two: on a crowded machine any rank may be the slowest once.
    """
    model = tiny(num_nextn_predict_layers=0, vocab_size=320)
    settings = config(small_data(tmp_path), model=model, **parallel)
    settings = replace(settings, data=replace(settings.data, sequence_length=8))
    for records in run_ranks(4, _sleep_in_forward, settings, sleeper, SLEPT / forwards):
        named = [record for record in records if record["straggler_rank"] == sleeper]
        assert named
        assert max(record["straggler_wait"] for record in named) > 0.4 * SLEPT
        assert max(record["straggler_wait_forward"] + record["straggler_wait_pair"] for record in named) > 0.4 * SLEPT


def _record(rank: int, wait: float) -> dict:
    figures = {"straggler_rank": rank, "straggler_wait": wait, "step_time": 1.0}
    return figures | {f"straggler_wait_{phase}": wait * (phase == "pair") for phase in PHASES}


def test_a_run_says_once_that_a_rank_is_slow_and_sums_up_at_the_end():
    waits = Waits()
    assert waits.summary() == ""
    said = [waits.add(_record(1, 0.1)) for _ in range(30)]
    assert not any(said)  # a tenth of a step is no reason
    said = [waits.add(_record(2, 0.5)) for _ in range(2 * FOR_LONG)]
    assert [line is not None for line in said] == [n == FOR_LONG for n in range(1, 2 * FOR_LONG + 1)]
    assert "rank 2 is slow" in said[FOR_LONG - 1]
    assert "in pair" in said[FOR_LONG - 1]
    said = [waits.add(_record(2 + n % 2, 0.5)) for n in range(2 * FOR_LONG)]
    assert not any(said)  # never in a row
    assert waits.summary() == "rank 2 in 30 of 70 steps, 15 s of 70 s, most of it in pair"
