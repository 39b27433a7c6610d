"""Moving rows: `Rows`, a 0/1 matrix kept as an index, and the plan of one exchange.

Every step of a dispatch copies rows to places (`expand`), and the same step of a combine adds the copies up again
where the rows came from (`add_up`): one matrix and its transpose. Both are one torch call for all rows, without a
loop over experts or tokens: a gather (`index_select`) and a gather-and-sum (`embedding_bag`, which sums in a fixed
order, in FP32 for BF16 rows, and on a CPU is three to five times as fast as `index_add_`).

A *pair* is one (token, expert) choice of the router; it is what a routing weight belongs to.
Letters: N pairs, S rows before, C copies sent, D model.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows:
    """The matrix P of shape [C, S] with one 1 in each line: copy c is row `index_C[c]` of S rows."""

    def __init__(self, index_C: Tensor, num_rows: int):
        self.index_C = index_C
        self.num_rows = num_rows

    def expand(self, x_SD: Tensor) -> Tensor:
        """P x: [S, D] -> [C, D], any dtype."""
        return x_SD.index_select(0, self.index_C)

    def add_up(self, y_CD: Tensor) -> Tensor:
        """P^T y: [C, D] -> [S, D]; a row that has no copies is zero."""
        if y_CD.numel() == 0:
            return y_CD.new_zeros(self.num_rows, y_CD.shape[1])
        order_C, starts_S = self._copies_by_row
        return F.embedding_bag(order_C, y_CD, starts_S, mode="sum")

    @cached_property
    def _copies_by_row(self) -> tuple[Tensor, Tensor]:
        """The copies sorted by row, and where each row's copies start. Built on the first sum, kept for the others."""
        counts_S = torch.bincount(self.index_C, minlength=self.num_rows)
        return torch.argsort(self.index_C, stable=True), counts_S.cumsum(0) - counts_S


class Departure(NamedTuple):
    """What leaves for an exchange with `num_dests` destinations, in the order of destinations."""

    rows: Rows  # the rows sent
    rows_per_dest: Tensor  # int64 [num_dests]
    pair_order_N: Tensor  # the pairs sent
    pairs_per_dest: Tensor  # int64 [num_dests]
    pair_row_N: Tensor  # the row of each pair sent, counted from the first row for its destination


def depart(row_N: Tensor, dest_N: Tensor, num_rows: int, num_dests: int, once: bool) -> Departure:
    """Sorts pairs by destination and finds the rows to send.

    With `once` a row that several pairs need at one destination is sent there once, and otherwise once a pair.
    """
    pair_order_N = torch.argsort(dest_N, stable=True)
    pairs_per_dest = torch.bincount(dest_N, minlength=num_dests)
    if once:
        key_N = dest_N * num_rows + row_N
        wanted = key_N.new_zeros(num_dests * num_rows)
        wanted[key_N] = 1
        key_C = wanted.nonzero().squeeze(1)
        copy_N = (wanted.cumsum(0) - 1)[key_N[pair_order_N]]
        sent_C = key_C % max(num_rows, 1)
        rows_per_dest = wanted.view(num_dests, num_rows).sum(1)
    else:
        copy_N = torch.arange(len(row_N), device=row_N.device)
        sent_C = row_N[pair_order_N]
        rows_per_dest = pairs_per_dest
    first_row = rows_per_dest.cumsum(0) - rows_per_dest
    pair_row_N = copy_N - first_row[dest_N[pair_order_N]]
    return Departure(Rows(sent_C, num_rows), rows_per_dest, pair_order_N, pairs_per_dest, pair_row_N)


def balanced_topk_idx(topk_idx_TK: Tensor, n_routed_experts: int, n_group: int, topk_group: int) -> Tensor:
    """Experts [T, K] that load every expert evenly, whatever the router says, each token in `topk_group` groups.

    Token t takes the groups t, t+1, ... and goes round the experts of each, so loads are equal when the tokens divide
    evenly. For benchmarks: only the shape, dtype and device of `topk_idx_TK` are used.
    """
    num_tokens, top_k = topk_idx_TK.shape
    experts_per_group = n_routed_experts // n_group
    per_group = -(-top_k // topk_group)
    if per_group > experts_per_group:
        raise ValueError(
            f"top {top_k} experts in {topk_group} groups need {per_group} experts a group, "
            f"but {n_routed_experts} experts in {n_group} groups are {experts_per_group} a group"
        )
    t_T1 = torch.arange(num_tokens, device=topk_idx_TK.device, dtype=topk_idx_TK.dtype).unsqueeze(1)
    k_K = torch.arange(top_k, device=topk_idx_TK.device, dtype=topk_idx_TK.dtype)
    slot_K, nth_K = k_K % topk_group, k_K // topk_group
    visit_TK = t_T1 // n_group * topk_group + slot_K  # how often this group was taken before
    return (t_T1 + slot_K) % n_group * experts_per_group + (visit_TK * per_group + nth_K) % experts_per_group
