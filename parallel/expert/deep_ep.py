"""DeepEP's kernels behind the four raw verbs: two hops over RDMA and NVLink, on CUDA.

DeepEP sends a token once to each rank that holds one of its experts (crossing nodes once for each node, as two_hop
does) and sums what comes back; sorting the received rows by local expert is left to its caller, and done here. What
it cannot do is refused at the first dispatch: payloads are BF16, or FP8 with FP32 scale factors in tiles that divide
the hidden size.

Not yet run on hardware: it follows the documented interface of `deep_ep.Buffer` (version 1), and is tested against a
double that records the calls and moves the rows with torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infra.fp8.quantize import Quantized, tile_cast
from infra.fp8.recipe import TILE
from model.dispatch import Routed
from parallel.expert.dispatcher import DispatchConfig, Dispatcher
from parallel.expert.lane import Pending
from parallel.expert.payload import row_bytes, values_of
from parallel.expert.permutation import Rows
from parallel.mesh import Mesh

_RANKS_PER_NODE = 8  # of DeepEP's kernels between nodes


class DeepEPHandle(NamedTuple):
    """DeepEP's own handle, where its rows go among the experts, and how many rows cross and stay (for counting)."""

    inner: Any
    rows: Rows  # from the S rows received to the R rows of the experts
    pair_R: tuple[Tensor, Tensor]  # row and slot of each of them
    num_slots: int
    num_across: int
    num_within: int


class DeepEPDispatcher(Dispatcher):
    """Raises ImportError when DeepEP is not installed, ValueError for a mesh its kernels do not know."""

    def __init__(self, mesh: Mesh, config: DispatchConfig):
        try:
            import deep_ep
        except ImportError as error:
            raise ImportError(
                "dispatcher=deep_ep needs DeepEP and CUDA: pip install git+https://github.com/deepseek-ai/DeepEP "
                "(or use dispatcher=two_hop, which runs anywhere)"
            ) from error
        super().__init__(mesh, config)
        if mesh.config.ep < 2:
            raise ValueError("dispatcher=deep_ep needs ep of at least 2; one rank needs dispatcher=local")
        if mesh.config.ep_nodes > 1 and mesh.config.ep_per_node != _RANKS_PER_NODE:
            raise ValueError(
                f"dispatcher=deep_ep knows nodes of {_RANKS_PER_NODE} ranks, but "
                f"ranks_per_node={mesh.config.node_size}: use ranks_per_node={_RANKS_PER_NODE}, or dispatcher=two_hop"
            )
        if config.dispatch_dtype == "fp8":
            raise ValueError("dispatcher=deep_ep sends FP32 scale factors: use dispatch_dtype=fp8_fp32_sf, or native")
        self._deep_ep = deep_ep
        self._buffer: Any = None

    def start_dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, topk_weights_TK: Tensor) -> Pending[Routed]:
        x_TD, topk_weights_TK = x_TD.detach(), topk_weights_TK.detach()
        num_experts, top_k = self.config.n_routed_experts, topk_idx_TK.shape[1]
        buffer, topk_idx_TK = self._buffer_for(x_TD), self.config.routing(topk_idx_TK)
        per_rank, per_rdma_rank, per_expert, is_token_in_rank, _ = buffer.get_dispatch_layout(topk_idx_TK, num_experts)
        payload, received_idx, received_weights, counts, inner, event = buffer.dispatch(
            self._encode(x_TD),
            topk_idx=topk_idx_TK,
            topk_weights=topk_weights_TK.float(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        at = self.mesh.config
        in_rank = is_token_in_rank.view(len(x_TD), at.ep_nodes, at.ep_per_node)
        on_node = in_rank.any(2)
        num_across = int(on_node.sum() - on_node[:, self.mesh.ep.rank // at.ep_per_node].sum())
        num_within = int(in_rank.sum() - in_rank[:, :, self.mesh.at.local].sum())
        self.traffic.count_nodes(topk_idx_TK, num_experts // at.ep_nodes)

        def finish() -> Routed:
            event.current_stream_wait()
            row_R, slot_R = (received_idx >= 0).nonzero(as_tuple=True)  # -1: an expert of another rank
            order_R = torch.argsort(received_idx[row_R, slot_R], stable=True)
            pair_R = row_R[order_R], slot_R[order_R]
            rows = Rows(pair_R[0], len(received_idx))
            handle = DeepEPHandle(inner, rows, pair_R, top_k, num_across, num_within)
            self._count("dispatch", handle, x_TD)
            self.traffic.num_pairs += len(order_R)
            num_tokens_per_expert_E = torch.tensor(counts, device=x_TD.device)
            weights_R = received_weights[pair_R].to(topk_weights_TK.dtype)
            return Routed(self._decode(payload, rows, x_TD.dtype), weights_R, num_tokens_per_expert_E, handle)

        return Pending(cache(finish))

    def start_dispatch_backward(
        self, gx_RD: Tensor, gw_R: Tensor, handle: DeepEPHandle
    ) -> Pending[tuple[Tensor, Tensor]]:
        gw_SK = torch.zeros(handle.rows.num_rows, handle.num_slots, dtype=torch.float32, device=gw_R.device)
        gw_SK[handle.pair_R] = gw_R.detach().float()
        gx_TD, gw_TK, event = self._combine(gx_RD, handle, topk_weights=gw_SK)

        def finish() -> tuple[Tensor, Tensor]:
            event.current_stream_wait()
            return gx_TD, gw_TK.to(gw_R.dtype)

        return Pending(cache(finish))

    def start_combine(self, y_RD: Tensor, handle: DeepEPHandle) -> Pending[Tensor]:
        y_TD, _, event = self._combine(y_RD, handle)

        def finish() -> Tensor:
            event.current_stream_wait()
            return y_TD

        return Pending(cache(finish))

    def start_combine_backward(self, gy_TD: Tensor, handle: DeepEPHandle) -> Pending[Tensor]:
        payload, *_, event = self._buffer.dispatch(self._encode(gy_TD.detach()), handle=handle.inner, async_finish=True)
        self._count("dispatch", handle, gy_TD)

        def finish() -> Tensor:
            event.current_stream_wait()
            return self._decode(payload, handle.rows, gy_TD.dtype)

        return Pending(cache(finish))

    def _combine(self, y_RD: Tensor, handle: DeepEPHandle, topk_weights: Tensor | None = None) -> tuple:
        sums_SD = handle.rows.add_up(y_RD.detach().contiguous())
        self._count("combine", handle, y_RD)
        return self._buffer.combine(sums_SD, handle.inner, topk_weights=topk_weights, async_finish=True)

    def _encode(self, x_TD: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if x_TD.dtype != torch.bfloat16:
            raise ValueError(f"dispatcher=deep_ep moves BF16 rows, not {x_TD.dtype}: use precision=bf16, or two_hop")
        if self.config.dispatch_dtype == "native":
            return x_TD.contiguous()
        if x_TD.shape[1] % TILE:
            raise ValueError(f"dispatcher=deep_ep with FP8 needs a hidden size in tiles of {TILE}, not {x_TD.shape[1]}")
        q_TD, sf_TJ = tile_cast(x_TD)
        return q_TD, sf_TJ

    def _decode(self, payload: Tensor | tuple[Tensor, Tensor], rows: Rows, dtype: torch.dtype) -> Tensor:
        if isinstance(payload, Tensor):
            return rows.expand(payload)
        q_TD, sf_TJ = payload
        q_RD = rows.expand(q_TD.view(torch.uint8)).view(q_TD.dtype)
        return values_of(Quantized(q_RD, rows.expand(sf_TJ)), dtype, power_of_two=False)

    def _count(self, leg: str, handle: DeepEPHandle, like_TD: Tensor) -> None:
        dtype = self.config.dispatch_dtype if leg == "dispatch" else "native"
        size = row_bytes(like_TD.shape[1], like_TD.itemsize, dtype)
        self.traffic.add(leg, across=handle.num_across * size, within=handle.num_within * size)

    def _buffer_for(self, x_TD: Tensor) -> Any:
        """The buffer is made at the first dispatch, which knows the hidden size."""
        if self._buffer is None:
            api, ranks, row = self._deep_ep.Buffer, self.mesh.config.ep, x_TD.shape[1] * x_TD.itemsize
            configs = api.get_dispatch_config(ranks), api.get_combine_config(ranks)
            nvl = max(config.get_nvl_buffer_size_hint(row, ranks) for config in configs)
            rdma = max(config.get_rdma_buffer_size_hint(row, ranks) for config in configs)
            self._buffer = api(self.mesh.ep.pg, nvl, rdma)
        return self._buffer
