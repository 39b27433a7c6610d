"""Times single kernels and single messages, all ranks at once, as training runs them: what `KernelRates` holds.

Every function returns seconds, the mean over ranks of each rank's median; products, rows and messages are those that
the planner's kernel lists ask for. Shapes: m, n, k sides of a product; R rows, D model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from infra.distributed import World
from infra.optim import Bucket, clip_gradients, global_grad_norm, make_adamw, update
from model.attention_core import attention
from model.config import ModelConfig
from model.matmul import add_mm_, grouped_mm, mm
from parallel.expert.chain import exchange
from parallel.expert.permutation import Rows
from parallel.mesh import Group

WARM_UPS, LEAST = 3, 5  # runs before the first that counts, and runs that count
UPDATED = 4_000_000  # parameters


class Stopwatch:
    """Times kernels on one rank of `world`; `seconds` is how long each may take."""

    def __init__(self, world: World, seconds: float):
        self.world, self.seconds = world, seconds

    def time(self, run: Callable[[], object]) -> float:
        """Collective: every rank runs it as often as the first rank has time for."""
        samples = [self._once(run) for _ in range(WARM_UPS)]
        times = torch.tensor(min(500, max(LEAST, int(self.seconds / max(samples[-1], 1e-9)))))
        if self.world.size > 1:
            dist.broadcast(times, 0)
        samples = [self._once(run) for _ in range(int(times))]
        mean = torch.tensor(median(samples), dtype=torch.float64)
        if self.world.size > 1:
            dist.all_reduce(mean)
        return mean.item() / self.world.size

    def _once(self, run: Callable[[], object]) -> float:
        self._finish()
        began = time.perf_counter()
        run()
        self._finish()
        return time.perf_counter() - began

    def _finish(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def product(self, kind: str, m: int, n: int, k: int, dtype: torch.dtype, groups: int = 1) -> float:
        """dense: x[m, k] W[n, k]^T; grouped: the rows shared out evenly over `groups` such W; wgrad: dW[m, n] in FP32
        summed over k tokens, added to what is there."""

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=self.world.device).to(dtype)

        if kind == "dense":
            x, weight = new(m, k), new(n, k)
            return self.time(lambda: mm(x, weight.t()))
        if kind == "grouped":
            x, weights = new(m, k), new(groups, n, k)
            counts = torch.tensor([m // groups + (g < m % groups) for g in range(groups)], device=self.world.device)
            return self.time(lambda: grouped_mm(x, weights.mT, counts))
        a, b = new(k, m), new(k, n)
        into = torch.zeros(m, n, device=self.world.device)
        return self.time(lambda: add_mm_(into, a.t(), b))

    def copy(self, num_bytes: int) -> float:
        x = torch.empty(num_bytes // 4, device=self.world.device).zero_()
        y = torch.empty_like(x)
        return self.time(lambda: y.copy_(x))

    def stream(self, rows: int, width: int, dtype: torch.dtype) -> float:
        """Two arrays read, one written."""
        x, y = (torch.randn(rows, width, device=self.world.device).to(dtype) for _ in range(2))
        out = torch.empty_like(x)
        return self.time(lambda: torch.add(x, y, out=out))

    def permute(self, tokens: int, copies: int, width: int, dtype: torch.dtype) -> float:
        """Rows to the experts' order, and their sums back."""
        x = torch.randn(tokens, width, device=self.world.device).to(dtype)
        order = torch.randperm(tokens * copies, device=self.world.device) % tokens
        rows = Rows(order, tokens)
        return self.time(lambda: rows.add_up(rows.expand(x)))

    def attention(self, model: ModelConfig, sequences: int, length: int, dtype: torch.dtype) -> tuple[float, float]:
        """(forward, backward) of the causal core."""
        shape = (sequences, model.num_attention_heads, length)
        widths = (model.qk_head_dim, model.qk_head_dim, model.v_head_dim)
        q, k, v = (torch.randn(*shape, width, device=self.world.device).to(dtype).requires_grad_() for width in widths)
        scale = model.qk_head_dim**-0.5
        with torch.no_grad():
            forward = self.time(lambda: attention(q, k, v, scale))
        out = attention(q, k, v, scale)
        grad = torch.randn_like(out)
        return forward, self.time(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))

    def update(self, dtype: torch.dtype) -> float:
        """Norm, clip and AdamW of `UPDATED` parameters in one bucket."""
        shapes = {"w": torch.Size((UPDATED // 1000, 1000))}
        bucket = Bucket(shapes, 0.1, dtype, torch.float32, self.world.device)
        bucket.master.data.zero_()
        optimizer = make_adamw([bucket], 1e-3, (0.9, 0.95), 1e-8)

        def run() -> None:
            bucket.grad.fill_(1.0)
            clip_gradients([bucket], global_grad_norm([bucket], 1), 1.0)
            update([bucket], optimizer, 1e-3)

        return self.time(run) - self.time(lambda: bucket.grad.fill_(1.0))

    def all_to_all(self, group: Group, rows: int, width: int, dtype: torch.dtype) -> float:
        """`rows` rows to every rank of the group, itself among them."""
        x = torch.zeros(rows * group.size, width, device=self.world.device, dtype=dtype)
        return self.time(lambda: exchange(group, x, [rows] * group.size, [rows] * group.size))

    def p2p(self, group: Group, rows: int, width: int, dtype: torch.dtype) -> float:
        """To the next rank of the group, from the one before it."""
        x = torch.zeros(rows, width, device=self.world.device, dtype=dtype)
        out = torch.empty_like(x)
        after, before = (group.ranks[(group.rank + step) % group.size] for step in (1, -1))

        def run() -> None:
            receive = dist.P2POp(dist.irecv, out, before, group.pg)
            for work in dist.batch_isend_irecv([receive, dist.P2POp(dist.isend, x, after, group.pg)]):
                work.wait()

        return self.time(run)

    def reduce(self, group: Group, numel: int) -> float:
        """Sum of FP32 gradients over the group."""
        x = torch.zeros(numel, device=self.world.device)
        return self.time(lambda: dist.all_reduce(x, group=group.pg))
