"""What a cluster is, as numbers: how fast its ranks compute, what they hold, how they are wired. No torch.

A cluster is one small YAML file in conf/cluster. Rates of kernels are rows of a table, "so many TFLOP/s at this shape";
a shape between the rows is read off the nearest ones. What is interpolated is not the rate but the share of the
*roofline* that it reaches (the lower of peak arithmetic and memory bandwidth times arithmetic intensity), so small and
thin products come out slow by themselves and a table moves to another device with other peaks. A table measured
elsewhere says where in `measured_on`, and every plan that rests on it repeats that.

Units: TFLOP/s, GB/s (10^9 bytes), GB of memory 10^9 bytes, microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, log
from typing import Any

DTYPE_BYTES = {"fp8": 1, "bf16": 2, "fp32": 4}
FAR = log(4.0)  # a shape further than this factor in any of m, n, k from every row of the table is not covered by it


@dataclass
class KernelRates:
    """Measured rates of kernels that run alone on all SMs of `device`, whose peaks stand beside them.

    dtype: that of the operands of dense, grouped and wgrad. dense: [m, n, k, TFLOP/s] of y[m, n] = x[m, k] W[n, k]^T.
    grouped: [m of all groups, n, k, TFLOP/s, groups]. wgrad: [m, n, k, TFLOP/s] of dW[m, n], FP32, summed over k
    tokens. attention_forward, attention_backward: TFLOP/s of the causal core, half of the square counted, over
    sequences of attention_length (0: any). stream_gbs: what a kernel reaches that only moves memory; permute_gbs, one
    that puts rows in another order; update_gbs, the optimizer. 0: as stream_gbs.
    """

    device: str = ""
    bf16_tflops: float = 0.0
    fp8_tflops: float = 0.0
    hbm_gbs: float = 0.0
    dense: list[Any] = field(default_factory=list)  # rows of numbers: OmegaConf takes no whole ones for float
    grouped: list[Any] = field(default_factory=list)
    wgrad: list[Any] = field(default_factory=list)
    attention_forward: float = 0.0
    attention_backward: float = 0.0
    attention_length: int = 0
    stream_gbs: float = 0.0
    permute_gbs: float = 0.0
    update_gbs: float = 0.0
    fp32_tflops: float = 0.0
    dtype: str = "fp8"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"cluster.rates.dtype={self.dtype}: expected one of {', '.join(DTYPE_BYTES)}")

    @property
    def peak(self) -> float:
        """FLOP/s of the device in `dtype`."""
        return 1e12 * float(getattr(self, f"{self.dtype}_tflops"))


@dataclass
class ClusterConfig:
    """num_ranks devices in nodes of ranks_per_node. Peaks are dense (no sparsity); fp8_tflops 0: the device has none.

    num_sms, comm_sms: multiprocessors, and those that communication occupies while it is overlapped with computing.
    node_gbs, network_gbs: what leaves one rank a second in an all-to-all, inside its node and between nodes (what it
    has to send to itself is not counted). node_latency_us, network_latency_us: of a small message. p2p_gbs,
    reduce_gbs: what a transfer between stages and a sum of gradients reach inside a node; 0: node_gbs.
    dollars_per_hour: of one rank. mtbf_hours: of one rank, between failures that stop the run. storage_gbs: what one
    node writes to storage. restart_s: from a failure to the next step, but for the work lost.
    expert_imbalance: how far the most loaded rank of a layer stands above the mean, as a share.
    measured: whole layers of a model as this cluster ran them (parallel/plan/measured.py). calibrated: what
    launch/calibrate.py ran on, with what, and when; empty where the figures were published by others.
    """

    name: str = ""
    device: str = ""
    num_ranks: int = 1
    ranks_per_node: int = 8
    memory_gb: float = 80.0
    hbm_gbs: float = 3350.0
    bf16_tflops: float = 989.4
    fp8_tflops: float = 0.0
    fp32_tflops: float = 66.9
    num_sms: int = 132
    comm_sms: int = 20
    node_gbs: float = 150.0
    network_gbs: float = 45.0
    node_latency_us: float = 3.0
    network_latency_us: float = 4.0
    p2p_gbs: float = 0.0
    reduce_gbs: float = 0.0
    host_memory_gb: float = 1000.0  # of a node
    storage_gbs: float = 10.0
    dollars_per_hour: float = 2.0
    mtbf_hours: float = 50_000.0
    restart_s: float = 900.0
    expert_imbalance: float = 0.0
    rates: KernelRates = field(default_factory=KernelRates)
    measured: list[Any] = field(default_factory=list)
    calibrated: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._seconds: dict[tuple, float] = {}  # of the shapes asked for before
        numbers = (
            "num_ranks ranks_per_node memory_gb hbm_gbs bf16_tflops fp32_tflops num_sms node_gbs network_gbs "
            "mtbf_hours storage_gbs host_memory_gb"
        )
        for name in numbers.split():
            if not 0 < getattr(self, name) < inf:  # nan is refused too
                raise ValueError(f"cluster.{name}={getattr(self, name)} must be above 0")
        others = (
            "fp8_tflops node_latency_us network_latency_us p2p_gbs reduce_gbs dollars_per_hour restart_s "
            "expert_imbalance"
        )
        for name in others.split():
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"cluster.{name}={getattr(self, name)} must be at least 0")
        if not 0 <= self.comm_sms < self.num_sms:
            raise ValueError(
                f"cluster.comm_sms={self.comm_sms} leaves none of cluster.num_sms={self.num_sms} to compute: lower it"
            )

    @property
    def sm_contention(self) -> float:
        """How much longer computing takes on the SMs that overlapped communication leaves: 132 / 112 on an H800."""
        return self.num_sms / (self.num_sms - self.comm_sms)

    @property
    def nodes(self) -> int:
        return max(1, self.num_ranks // self.ranks_per_node)

    def peak(self, dtype: str) -> float:
        """FLOP/s of the matrix units; FP8 where there is none runs as BF16."""
        tflops = {"fp8": self.fp8_tflops or self.bf16_tflops, "bf16": self.bf16_tflops, "fp32": self.fp32_tflops}
        return 1e12 * tflops[dtype]

    def matmul(self, kind: str, m: int, n: int, k: int, dtype: str, groups: int = 1) -> float:
        """Seconds of a product on all SMs. kind: dense, grouped or wgrad; shapes as in `KernelRates`."""
        shape = (kind, m, n, k, dtype, groups)
        if shape not in self._seconds:
            table = getattr(self.rates, kind) or self.rates.dense
            share = _share(table, self.rates, m, n, k, groups, kind)
            at_most = _roofline(self.peak(dtype), self.hbm_gbs, m, n, k, groups, dtype, kind)
            self._seconds[shape] = 2.0 * m * n * k / (share * at_most)
        return self._seconds[shape]

    def attention(self, flops: float, backward: bool) -> float:
        """Seconds of the attention core (BF16) with so many FLOPs, the causal half counted."""
        rate = self.rates.attention_backward if backward else self.rates.attention_forward
        return flops / (1e12 * rate * self.bf16_tflops / self.rates.bf16_tflops)

    def stream(self, num_bytes: float) -> float:
        """Seconds of a kernel that reads and writes so many bytes and computes next to nothing."""
        return self._at(self.rates.stream_gbs, num_bytes)

    def permute(self, num_bytes: float) -> float:
        """Seconds of putting rows in another order, or adding up copies of them."""
        return self._at(self.rates.permute_gbs or self.rates.stream_gbs, num_bytes)

    def update(self, num_bytes: float) -> float:
        """Seconds of an optimizer that reads and writes so many bytes."""
        return self._at(self.rates.update_gbs or self.rates.stream_gbs, num_bytes)

    def _at(self, gbs: float, num_bytes: float) -> float:
        return num_bytes / (1e9 * gbs * self.hbm_gbs / self.rates.hbm_gbs)

    def asked(self) -> list[tuple]:
        """The products asked for so far: (kind, m, n, k, dtype, groups)."""
        return list(self._seconds)

    def uncovered(self) -> list[str]:
        """The shapes asked for so far that are further than a factor of 4 from every row of their table."""
        return [
            f"{kind} {m}x{n}x{k}"
            for kind, m, n, k, *_ in self._seconds
            if not any(
                max(abs(log(a / b)) for a, b in zip((m, n, k), row[:3], strict=True)) <= FAR + 1e-9
                for row in getattr(self.rates, kind)
            )
        ]


def _roofline(peak: float, hbm_gbs: float, m: float, n: float, k: float, groups: float, dtype: str, kind: str) -> float:
    """FLOP/s at most: operands are read once, the output is written once (BF16; FP32, read too, by wgrad)."""
    out = 8 if kind == "wgrad" else 4 if dtype == "fp32" else 2
    weights = 1 if kind == "wgrad" else groups
    num_bytes = DTYPE_BYTES[dtype] * (m * k + weights * n * k) + out * m * n
    return min(peak, 1e9 * hbm_gbs * 2.0 * m * n * k / num_bytes)


def _share(
    table: list[list[float]], rates: KernelRates, m: float, n: float, k: float, groups: float, kind: str
) -> float:
    """The share of the roofline at this shape: the mean over the table, weighted by closeness in log m, n, k.

    Exact on the rows of the table; the weights fall with the fourth power of the distance.
    """
    total = weight_sum = 0.0
    for row in table:
        at_groups = row[4] if len(row) > 4 else 1
        at_most = _roofline(rates.peak, rates.hbm_gbs, row[0], row[1], row[2], at_groups, rates.dtype, kind)
        share = 1e12 * row[3] / at_most
        square = log(m / row[0]) ** 2 + log(n / row[1]) ** 2 + log(k / row[2]) ** 2 + log(groups / at_groups) ** 2
        if square < 1e-18:
            return share
        weight = square**-2
        total, weight_sum = total + weight * share, weight_sum + weight
    return total / weight_sum
