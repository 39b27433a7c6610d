import pytest

from infra.hardware import ClusterConfig, KernelRates
from launch.validate import config_of

CLUSTERS = ("h800_2048", "h100", "h200", "b200", "gb200", "laptop")


@pytest.fixture(scope="module")
def h800() -> ClusterConfig:
    return config_of("cluster=h800_2048").cluster


def test_published_rates_come_back_exactly(h800: ClusterConfig) -> None:
    for kind in ("dense", "grouped", "wgrad"):
        for m, n, k, tflops, *groups in getattr(h800.rates, kind):
            seconds = h800.matmul(kind, m, n, k, "fp8", *groups)
            assert 2e-12 * m * n * k / seconds == pytest.approx(tflops, rel=1e-12)


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "fp32"])
def test_no_product_beats_its_roofline_and_more_work_takes_longer(h800: ClusterConfig, dtype: str) -> None:
    rows = (64, 512, 4096, 32768)  # below 64 all time is the weights', and rows of the table differ by more
    for n, k in ((2112, 7168), (7168, 2048), (100, 64), (129280, 7168)):
        times = [h800.matmul("dense", m, n, k, dtype) for m in rows]
        assert times == sorted(times)
        assert all(2 * m * n * k / t <= h800.peak(dtype) for m, t in zip(rows, times, strict=True))


def test_thin_products_are_bound_by_memory(h800: ClusterConfig) -> None:
    seconds = h800.matmul("dense", 1, 7168, 7168, "fp8")
    assert seconds >= 7168 * 7168 / (1e9 * h800.hbm_gbs)


def test_contention_is_the_published_one(h800: ClusterConfig) -> None:
    assert h800.sm_contention == 132 / 112


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_composes(name: str) -> None:
    cluster = config_of(f"cluster={name}").cluster
    assert cluster.name == name
    assert cluster.num_ranks % cluster.ranks_per_node == 0
    assert cluster.matmul("dense", 4096, 7168, 2048, "fp8") > 0


def test_a_faster_device_is_faster(h800: ClusterConfig) -> None:
    b200 = config_of("cluster=b200").cluster
    for kind, m, n, k in (("dense", 4096, 7168, 16384), ("wgrad", 7168, 4096, 8192)):
        assert b200.matmul(kind, m, n, k, "fp8") < h800.matmul(kind, m, n, k, "fp8")
    assert b200.stream(1e9) < h800.stream(1e9)
    assert b200.attention(1e12, backward=True) < h800.attention(1e12, backward=True)


def test_shapes_far_from_every_measured_one_are_named() -> None:
    cluster = ClusterConfig(rates=KernelRates("x", 989, 1979, 3350, dense=[[4096, 4096, 4096, 1000.0]]))
    cluster.matmul("dense", 8192, 4096, 2048, "fp8")
    assert cluster.uncovered() == []
    cluster.matmul("dense", 4096, 64, 4096, "fp8")
    assert cluster.uncovered() == ["dense 4096x64x4096"]


def test_refusals_name_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"cluster\.memory_gb=0 must be above 0"):
        ClusterConfig(memory_gb=0)
    with pytest.raises(ValueError, match=r"cluster\.comm_sms=132 leaves none of cluster.num_sms=132"):
        ClusterConfig(comm_sms=132)
