"""The loss curve is the same under every layout, up to rounding: the best test there is."""

import pytest

from tests.launch.runs import config, small_data, train
from tests.parallel.layouts import EVERY_PIPELINE, tiny
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def reference(data):
    """20 steps on one rank, microbatches of one."""
    return {precision: run_ranks(1, train, config(data, precision=precision), 20)[0] for precision in ("fp64", "fp32")}


# a layer for each stage of every schedule at PP 8
DEEP = tiny(num_hidden_layers=16, vocab_size=320, initializer_range=0.1)


@pytest.fixture(scope="module")
def deep_reference(data):
    """20 steps of the deep model on one rank."""
    deep = {precision: config(data, model=DEEP, precision=precision) for precision in ("fp64", "fp32")}
    return {precision: run_ranks(1, train, config, 20)[0] for precision, config in deep.items()}


PRECISIONS = pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-9), ("fp32", 1e-4)])


def assert_same_curve(records, expected, tolerance):
    """In float32 a router's choice may flip on rounding: the losses still agree."""
    keys = ["lm_loss"]
    if tolerance < 1e-6:
        keys += ["loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio", "eval_loss"]
    assert len(records) == len(expected)
    for got, want in zip(records, expected, strict=True):
        for key in keys:
            if key in want:
                assert got[key] == pytest.approx(want[key], rel=tolerance), f"step {want.get('step')} {key}"


@PRECISIONS
def test_four_data_parallel_ranks(data, reference, precision, tolerance):
    for rank in run_ranks(4, train, config(data, precision=precision), 20):
        assert_same_curve(rank, reference[precision], tolerance)


def test_microbatch_size(data, reference):
    records = run_ranks(1, train, config(data, train={"microbatch_size": 4}), 20)[0]
    assert_same_curve(records, reference["fp64"], 1e-9)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"pp": 2, "schedule": "1f1b"}),
        (2, {"pp": 2, "schedule": "zbv"}),
        (4, {"pp": 4, "schedule": "dualpipe"}),
        (4, {"pp": 2, "ep": 2, "schedule": "dualpipe", "dispatcher": "two_hop", "ranks_per_node": 2}),
        pytest.param(4, {"ep": 4, "dispatcher": "two_hop", "ranks_per_node": 2}, marks=pytest.mark.slow),
        (4, {"ep": 2, "dispatcher": "all_to_all"}),
    ],
)
def test_pipelines_and_experts(data, reference, world, parallel):
    for rank in run_ranks(world, train, config(data, **parallel), 20):
        assert_same_curve(rank, reference["fp64"], 1e-9)


@pytest.mark.slow
@PRECISIONS
@pytest.mark.parametrize(("schedule", "pp"), EVERY_PIPELINE)
def test_every_schedule(data, deep_reference, schedule, pp, precision, tolerance):
    words = config(data, model=DEEP, pp=pp, schedule=schedule, precision=precision)
    for rank in run_ranks(pp, train, words, 20):
        assert_same_curve(rank, deep_reference[precision], tolerance)


def test_an_uneven_split(data):
    model = tiny(num_hidden_layers=5, vocab_size=320, initializer_range=0.1, first_k_dense_replace=2)
    alone = run_ranks(1, train, config(data, model=model), 5)[0]
    piped = config(data, model=model, pp=2, schedule="1f1b", layers_per_stage=[2, 3])  # no expert on rank 0
    for rank in run_ranks(2, train, piped, 5):
        assert_same_curve(rank, alone, 1e-9)


def test_a_batch_that_does_not_divide_is_refused(data):
    with pytest.raises(AssertionError, match=r"train.global_batch_size=6 .* dp=4 .* such as 4"):
        run_ranks(4, train, config(data, train={"global_batch_size": 6}), 1)


def test_fp8_under_a_pipeline_with_split_backwards(data):
    """Quantisation is the same wherever a layer runs; only the rounding of FP32 sums and of BF16 weights differs."""
    alone = run_ranks(1, train, config(data, precision="fp8"), 4)[0]
    for rank in run_ranks(2, train, config(data, precision="fp8", pp=2, schedule="zbv"), 4):
        for got, want in zip(rank[:-1], alone, strict=False):
            assert got["lm_loss"] == pytest.approx(want["lm_loss"], rel=1e-3)
