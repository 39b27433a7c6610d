"""Overlap changes when things run, and not one bit of what comes out."""

import pytest
import torch

from infra.optim import Reduction
from parallel.config import ParallelConfig
from parallel.pipeline.overlap import ORDER, Side, run_pair
from parallel.pipeline.passes import PAIRABLE, in_turn
from tests.parallel.layouts import begin, build, tiny
from tests.ranks import run_ranks


def _side(name, phases, log, weight_grad=False):
    def run():
        for phase in phases:
            yield phase
            log.append(f"{phase}({name})")
        return name

    return Side(run(), lambda result: log.append(f"done({result})"), lambda: log.append("W") if weight_grad else None)


def test_two_aligned_moe_layers_run_in_the_published_order():
    log: list[str] = []
    layer = ["attend", "dispatch", "shared", "experts", "combine"]
    back = ["combine", "shared", "experts", "dispatch", "attend"]
    run_pair(_side("F", layer * 2, log), _side("B", back * 2, log))
    computes = [entry for entry in log if entry.startswith(("attend", "experts"))]
    assert computes == [
        *("attend(F)", "experts(B)", "experts(F)", "attend(B)"),
        *("attend(F)", "experts(B)", "experts(F)", "attend(B)"),
    ]
    travels = [entry for entry in log if entry.startswith(("dispatch", "combine"))]
    assert travels == ["combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)"] * 2


def test_the_ends_of_the_model_put_nobody_out_of_step():
    layer = ["attend", "dispatch", "shared", "experts", "combine"]
    back = layer[::-1]
    plain: list[str] = []
    run_pair(_side("F", layer * 2, plain), _side("B", back * 2, plain))
    for before, after in ((["embed"], []), ([], ["head"]), (["embed"], ["predict", "head"])):
        log: list[str] = []
        run_pair(_side("F", before + layer * 2, log), _side("B", after[:1] + back * 2 + after[1:], log))
        assert [e for e in log if not e.startswith(("embed", "head", "predict"))] == plain


def test_dense_layers_are_spread_over_the_travel_of_the_other_side():
    log: list[str] = []
    run_pair(_side("F", ["attend", "dispatch", "experts"], log), _side("B", ["dense"] * 3, log))
    assert log.index("dispatch(F)") < len(log) - 1 - log[::-1].index("dense(B)") < log.index("experts(F)")


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (["embed", "dense"], ["predict", "combine", "shared", "experts", "dispatch", "attend", "join", "head"]),
        (["attend", "dispatch", "shared", "experts", "combine"] * 3, ["dense"]),
        (["dense"], ["dense"]),
    ],
)
def test_stages_of_different_kinds_run_to_their_ends(forward, backward):
    log: list[str] = []
    run_pair(_side("F", forward, log), _side("B", backward, log))
    assert [e.removesuffix("(F)") for e in log if e.endswith("(F)") and "done" not in e] == forward
    assert [e.removesuffix("(B)") for e in log if e.endswith("(B)") and "done" not in e] == backward
    assert {"done(F)", "done(B)"} <= set(log)


def test_every_row_of_the_table_is_a_phase_of_a_layer_or_between():
    phases = {"attend", "dispatch", "shared", "experts", "combine"}
    assert {phase for _, phase in ORDER} == phases | {"weight_grad", "recompute", "send"}


def test_recomputation_fills_the_time_in_which_gradients_travel():
    log: list[str] = []
    again = ["combine", "recompute", "shared", "recompute", "experts", "dispatch", "recompute", "attend"]
    run_pair(_side("F", ["attend", "dispatch", "shared", "experts", "combine", "send"], log), _side("B", again, log))
    position = {entry: k for k, entry in enumerate(log)}
    assert log.index("combine(B)") < log.index("recompute(B)") < position["experts(B)"]
    assert position["combine(F)"] < position["recompute(B)"] < position["attend(B)"] < position["send(F)"]


def test_weight_gradients_left_over_hide_the_last_journey_of_the_forward():
    log: list[str] = []
    run_pair(_side("F", ["attend", "combine", "send"], log), _side("B", ["attend"], log, weight_grad=True))
    assert log.index("done(B)") < log.index("send(F)")
    assert "W" in log[log.index("done(B)") : log.index("send(F)")]


def _gradients(rank, world, config, parallel, num_microbatches):
    result = {}
    pairs = parallel.make_schedule(num_microbatches)
    for overlap, schedule in ((False, in_turn(pairs)), (True, pairs)):
        replica, executor, mesh = build(config, parallel, world, num_microbatches, schedule)
        begin(config, replica, mesh, num_microbatches)
        executor.step()
        Reduction(replica.buckets).wait()
        result[overlap] = [b.grad.clone() for b in replica.buckets]
    return all(torch.equal(off, on) for off, on in zip(result[False], result[True], strict=True))


SCHEDULES = ("dualpipe", "dualpipev", *PAIRABLE)
EVERY = [(p, r, d, s) for p in SCHEDULES for r in ("none", "selective", "full") for d in (0, 1, 2) for s in (0, 1, 2)]
SOME = {("dualpipe", "none", 0, 0), ("dualpipe", "full", 1, 1), ("dualpipe", "selective", 2, 2)}
SOME |= {(schedule, "full", 0, 1) for schedule in SCHEDULES[1:]}


@pytest.mark.parametrize(
    ("schedule", "recompute", "depths", "shared"),
    [c if c in SOME else pytest.param(*c, marks=pytest.mark.slow) for c in EVERY],
)
def test_overlap_is_bit_for_bit(schedule, recompute, depths, shared):
    config = tiny(num_nextn_predict_layers=depths, n_shared_experts=shared)
    parallel = ParallelConfig(
        pp=2, ep=2, schedule=schedule, dispatcher="two_hop", ranks_per_node=2, recompute=recompute
    )
    assert all(run_ranks(4, _gradients, config, parallel, 4))
