"""The DeepEP adapter against a double: the calls of the documented interface, the rows moved with torch over gloo.

The double has the signatures of `deep_ep.Buffer`, refuses what the real one refuses, and sends each token once to
each rank that holds one of its experts. Numerics are BF16, as DeepEP's are, so the twin is the two-hop dispatcher in
BF16.
"""

import inspect
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from parallel.expert import DISPATCHERS
from parallel.expert.dispatcher import DispatchConfig
from parallel.mesh import Mesh, MeshConfig
from tests.ranks import run_ranks


class Event:
    def __init__(self, log):
        self.log = log

    def current_stream_wait(self):
        self.log.append("wait")


class SizeHints:
    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return 1000 * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        return 0


def _all_to_all(rows, sent, received, group):
    out = rows.new_empty(sum(received), *rows.shape[1:])
    as_bytes = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (out, rows.contiguous()))
    dist.all_to_all_single(*as_bytes, received, sent, group=group)
    return out


class Buffer:
    """What `deep_ep.Buffer` does, slowly; `log` has the names of the calls."""

    log: list = []  # noqa: RUF012

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=12):
        assert num_nvl_bytes > 0
        self.group, self.size = group, dist.get_world_size(group)

    @staticmethod
    def get_dispatch_config(num_ranks):
        return SizeHints()

    @staticmethod
    def get_combine_config(num_ranks):
        return SizeHints()

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        self.log.append("get_dispatch_layout")
        assert topk_idx.dtype == torch.int64
        rank = topk_idx // (num_experts // self.size)
        is_token_in_rank = torch.zeros(len(topk_idx), self.size, dtype=torch.bool).scatter_(1, rank, True)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        return is_token_in_rank.sum(0).int(), None, per_expert, is_token_in_rank, Event(self.log)

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self.log.append("cached dispatch" if handle is not None else "dispatch")
        parts = x if isinstance(x, tuple) else (x,)
        assert [p.dtype for p in parts] in ([torch.bfloat16], [torch.float8_e4m3fn, torch.float32])
        idx = weights = counts = None
        if handle is None:
            assert topk_weights.dtype == torch.float32
            destination, token = is_token_in_rank.t().nonzero(as_tuple=True)
            sent = num_tokens_per_rank.tolist()
            received = _all_to_all(num_tokens_per_rank, [1] * self.size, [1] * self.size, self.group).tolist()
            handle = (token, sent, received, len(is_token_in_rank))
            num_local = len(num_tokens_per_expert) // self.size
            local = topk_idx[token] - destination[:, None] * num_local
            mine = (local >= 0) & (local < num_local)
            idx = _all_to_all(torch.where(mine, local, -1), sent, received, self.group)
            weights = _all_to_all(topk_weights[token] * mine, sent, received, self.group)
            counts = torch.bincount(idx[idx >= 0], minlength=num_local).tolist()
        else:
            assert topk_idx is None
            assert topk_weights is None
        token, sent, received, _ = handle
        out = tuple(_all_to_all(p[token], sent, received, self.group) for p in parts)
        return out if isinstance(x, tuple) else out[0], idx, weights, counts, handle, Event(self.log)

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self.log.append("combine")
        assert x.dtype == torch.bfloat16
        token, sent, received, num_tokens = handle

        def home(rows):
            back = _all_to_all(rows, received, sent, self.group)
            return torch.zeros(num_tokens, rows.shape[1]).index_add_(0, token, back.float()).to(rows.dtype)

        return home(x), None if topk_weights is None else home(topk_weights), Event(self.log)


@pytest.fixture
def double(monkeypatch):
    module = ModuleType("deep_ep")
    module.Buffer = Buffer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_ep", module)


def _against_two_hop(rank: int, world_size: int, dispatch_dtype: str) -> list[str]:
    mesh = Mesh(MeshConfig(ep=world_size, ranks_per_node=8, world=world_size))
    generator = torch.Generator().manual_seed(rank)
    x, gy = (torch.randn(5 + rank, 256, generator=generator).bfloat16() for _ in range(2))
    topk_idx = torch.rand(5 + rank, 16, generator=generator).topk(4).indices
    weights = torch.rand(5 + rank, 4, generator=generator)
    Buffer.log.clear()
    found = {}
    for name in ("deep_ep", "two_hop"):
        dispatcher = DISPATCHERS[name](mesh, DispatchConfig(16, dispatch_dtype=dispatch_dtype))
        x_in, w_in = x.clone().requires_grad_(), weights.clone().requires_grad_()
        routed = dispatcher.dispatch(x_in, topk_idx, w_in)
        expert_R1 = torch.arange(16 // world_size).repeat_interleave(routed.num_tokens_per_expert_E).unsqueeze(1)
        y_RD = routed.x_RD * (routed.weights_R.unsqueeze(1) * (1 + rank + expert_R1)).bfloat16()
        y = dispatcher.combine(y_RD, routed.handle)
        grads = torch.autograd.grad(y, (x_in, w_in), gy)
        record = {k: v for k, v in dispatcher.traffic.record(mesh.ep).items() if "routing" not in k}
        found[name] = [y, *grads], routed.num_tokens_per_expert_E.tolist(), record
    for ours, theirs in zip(found["deep_ep"][0], found["two_hop"][0], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-6, atol=2**-5)
    assert found["deep_ep"][1:] == found["two_hop"][1:]
    return list(Buffer.log)


@pytest.mark.parametrize("dispatch_dtype", ["native", "fp8_fp32_sf"])
def test_it_agrees_with_two_hop_and_calls_in_order(double, dispatch_dtype):
    calls = ["get_dispatch_layout", "dispatch", "wait", "combine", "wait", "cached dispatch", "wait", "combine", "wait"]
    assert run_ranks(4, _against_two_hop, dispatch_dtype) == [calls] * 4


def _message(rank: int, world_size: int, sizes: dict, options: dict) -> str:
    try:
        mesh = Mesh(MeshConfig(world=world_size, **sizes))
        dispatcher = DISPATCHERS["deep_ep"](mesh, DispatchConfig(16, **options))
        x = torch.randn(2, 100, dtype=torch.bfloat16 if options else torch.float32)
        dispatcher.dispatch(x, torch.tensor([[0], [1]]), torch.rand(2, 1))
    except (ValueError, ImportError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ({"ep": 1}, {}, "needs ep of at least 2"),
        ({"ep": 4, "ranks_per_node": 2}, {}, "knows nodes of 8 ranks, but ranks_per_node=2"),
        ({"ep": 4}, {"dispatch_dtype": "fp8"}, "use dispatch_dtype=fp8_fp32_sf"),
        ({"ep": 4}, {"dispatch_dtype": "fp8_fp32_sf"}, "hidden size in tiles of 128, not 100"),
        ({"ep": 4}, {}, "moves BF16 rows, not torch.float32"),
    ],
)
def test_what_it_cannot_do_is_refused(double, sizes, options, words):
    assert all(words in message for message in run_ranks(4, _message, sizes, options))


def test_without_deep_ep_it_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(ImportError, match=r"pip install git\+https://github.com/deepseek-ai/DeepEP"):
        DISPATCHERS["deep_ep"](Mesh(MeshConfig()), DispatchConfig(16))


@pytest.mark.gpu
def test_the_double_has_the_signatures_of_the_real_one():
    real = pytest.importorskip("deep_ep").Buffer
    for name in ("get_dispatch_layout", "dispatch", "combine"):
        wanted = list(inspect.signature(getattr(Buffer, name)).parameters)
        assert [p for p in inspect.signature(getattr(real, name)).parameters if p in wanted] == wanted
