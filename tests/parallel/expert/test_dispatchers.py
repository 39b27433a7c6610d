"""All dispatchers against one obviously right twin: a float64 loop over tokens and experts, on one rank, with autograd.

Every rank holds its own tokens and a slice of the experts; the twin holds all tokens and all experts. Outputs,
gradients of tokens, routing weights and experts must be the twin's to 1e-10, for any routing and any number of tokens
a rank.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.dispatch import LocalDispatcher
from parallel.expert import DISPATCHERS
from parallel.expert.dispatcher import DispatchConfig
from parallel.expert.payload import decode, encode
from parallel.mesh import Mesh, MeshConfig
from tests.ranks import run_ranks

SHAPES = [  # name, ep, ranks_per_node
    ("local", 1, 8),
    *((name, ep, size) for name in ("all_to_all", "two_hop") for ep, size in [(1, 8), (2, 8), (2, 1), (4, 2), (4, 1)]),
]
EIGHT = [("all_to_all", 8, 2), ("two_hop", 8, 8), ("two_hop", 8, 4), ("two_hop", 8, 2)]


class Problem(NamedTuple):
    """The tokens of one rank and what the router decided; `experts_EDD` is a matrix an expert, of all experts."""

    x_TD: Tensor
    topk_idx_TK: Tensor
    topk_weights_TK: Tensor
    gy_TD: Tensor


def make_problem(
    num_tokens: int, num_experts: int, top_k: int, hidden: int, rank: int, routing: str = "any"
) -> Problem:
    generator = torch.Generator().manual_seed(1000 + rank)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if routing == "one":  # the first experts get everything
        scores = -torch.arange(num_experts).expand(num_tokens, -1).float()
    if routing == "odd":  # every other expert stays empty
        scores[:, ::2] -= 2
    topk_idx = scores.topk(top_k, dim=1).indices
    x, weights, gy = (
        torch.randn(num_tokens, n, generator=generator, dtype=torch.float64) for n in (hidden, top_k, hidden)
    )
    return Problem(x, topk_idx, weights, gy)


def make_experts(num_experts: int, hidden: int) -> Tensor:
    return torch.randn(num_experts, hidden, hidden, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def twin(problem: Problem, experts_EDD: Tensor) -> tuple[Tensor, ...]:
    """Token by token, expert by expert: output and the gradients of tokens, weights and experts."""
    x, weights, experts = (t.clone().requires_grad_() for t in (problem.x_TD, problem.topk_weights_TK, experts_EDD))
    y = 0 * (x + weights.sum() + experts.sum())
    for t, chosen in enumerate(problem.topk_idx_TK.tolist()):
        for k, e in enumerate(chosen):
            y = y.index_add(0, torch.tensor([t]), (weights[t, k] * (x[t] @ experts[e]).tanh()).unsqueeze(0))
    grads = torch.autograd.grad(y, (x, weights, experts), problem.gy_TD)
    return y.detach(), *grads


def layer(dispatcher, problem: Problem, experts_EDD: Tensor) -> tuple[Tensor, ...]:
    """The same through a dispatcher; `experts_EDD` are the experts of this rank."""
    x, weights, experts = (t.clone().requires_grad_() for t in (problem.x_TD, problem.topk_weights_TK, experts_EDD))
    routed = dispatcher.dispatch(x, problem.topk_idx_TK, weights)
    rows = routed.x_RD.split(routed.num_tokens_per_expert_E.tolist())
    out = torch.cat([(r @ expert).tanh() for r, expert in zip(rows, experts, strict=True)])
    y = dispatcher.combine(routed.weights_R.unsqueeze(1) * out, routed.handle)
    grads = torch.autograd.grad(y, (x, weights, experts), problem.gy_TD)
    return y.detach(), *grads


def worst_error(dispatcher, mesh: Mesh, problem: Problem, experts_EDD: Tensor) -> float:
    """Against the twin of this rank's tokens; the experts' gradients are summed over the ranks' twins."""
    num_local = len(experts_EDD) // mesh.ep.size
    mine = slice(mesh.ep.rank * num_local, (mesh.ep.rank + 1) * num_local)
    found = layer(dispatcher, problem, experts_EDD[mine])
    wanted = [t.contiguous() for t in twin(problem, experts_EDD)]  # gloo reads an expanded tensor beyond its end
    if mesh.ep.pg is not None:
        torch.distributed.all_reduce(wanted[3], group=mesh.ep.pg)
    wanted[3] = wanted[3][mine]
    return max((f - w).abs().max().item() if f.numel() else 0.0 for f, w in zip(found, wanted, strict=True))


NUM_EXPERTS, TOP_K, HIDDEN = 16, 4, 5


def _check_shape(rank: int, world_size: int, name: str, ranks_per_node: int) -> dict[str, float]:
    mesh = Mesh(MeshConfig(ep=world_size, ranks_per_node=ranks_per_node, world=world_size))
    dispatcher = DISPATCHERS[name](mesh, DispatchConfig(NUM_EXPERTS))
    experts = make_experts(NUM_EXPERTS, HIDDEN)
    errors = {}
    for case, num_tokens, routing in [
        ("even", 6, "any"),
        ("uneven", 2 + 3 * rank, "any"),
        ("half the ranks have no token", 5 * (rank % 2), "any"),
        ("no token at all", 0, "any"),
        ("one token", int(rank == 0), "any"),
        ("all to one rank", 4, "one"),
        ("empty experts", 4, "odd"),
    ]:
        problem = make_problem(num_tokens, NUM_EXPERTS, TOP_K, HIDDEN, rank, routing)
        errors[case] = worst_error(dispatcher, mesh, problem, experts)
    return errors


@pytest.mark.parametrize(("name", "ep", "ranks_per_node"), SHAPES + EIGHT)
def test_equals_the_twin_for_any_routing(name, ep, ranks_per_node):
    for errors in run_ranks(ep, _check_shape, name, ranks_per_node):
        assert max(errors.values()) < 1e-10, errors


def test_local_needs_no_process_group():
    mesh = Mesh(MeshConfig())
    problem = make_problem(9, NUM_EXPERTS, TOP_K, HIDDEN, rank=0)
    for name in ("local", "all_to_all", "two_hop"):
        dispatcher = DISPATCHERS[name](mesh, DispatchConfig(NUM_EXPERTS))
        assert worst_error(dispatcher, mesh, problem, make_experts(NUM_EXPERTS, HIDDEN)) < 1e-12


def _expanded_gradient(rank: int, world_size: int) -> None:
    """`.sum()` hands down a gradient of stride 0, which gloo would read beyond its end."""
    mesh = Mesh(MeshConfig(ep=world_size, ranks_per_node=2, world=world_size))
    problem = make_problem(5, NUM_EXPERTS, TOP_K, HIDDEN, rank)
    for name in ("all_to_all", "two_hop"):
        dispatcher = DISPATCHERS[name](mesh, DispatchConfig(NUM_EXPERTS))
        x, weights = problem.x_TD.clone().requires_grad_(), problem.topk_weights_TK.clone().requires_grad_()
        routed = dispatcher.dispatch(x, problem.topk_idx_TK, weights)
        (dispatcher.combine(routed.x_RD, routed.handle).sum() + routed.weights_R.sum() + routed.x_RD.sum()).backward()
        assert torch.equal(x.grad, torch.full_like(x, 2.0 * TOP_K))
        assert torch.equal(weights.grad, torch.ones_like(weights))


def test_expanded_gradients():
    run_ranks(4, _expanded_gradient)


def _two_under_way(rank: int, world_size: int) -> float:
    """Everything of two microbatches started before anything is waited for, as an overlapped pair does."""
    mesh = Mesh(MeshConfig(ep=world_size, ranks_per_node=2, world=world_size))
    dispatcher = DISPATCHERS["two_hop"](mesh, DispatchConfig(NUM_EXPERTS))
    problems = [make_problem(n, NUM_EXPERTS, TOP_K, HIDDEN, 10 * n + rank) for n in (7, 3)]
    dispatched = [dispatcher.start_dispatch(p.x_TD, p.topk_idx_TK, p.topk_weights_TK) for p in problems]
    routed = [pending.wait() for pending in dispatched]
    combined = [dispatcher.start_combine(r.x_RD, r.handle) for r in routed]
    back = [
        (
            dispatcher.start_combine_backward(p.gy_TD, r.handle),
            dispatcher.start_dispatch_backward(r.x_RD, r.weights_R, r.handle),
        )
        for p, r in zip(problems, routed, strict=True)
    ]
    errors = []
    for p, y, (gy, gx) in zip(problems, combined, back, strict=True):
        errors += [y.wait() - TOP_K * p.x_TD, gx.wait()[0] - TOP_K * p.x_TD, gx.wait()[1] - p.topk_weights_TK]
        assert torch.equal(gy.wait(), dispatcher.start_dispatch(p.gy_TD, p.topk_idx_TK, p.topk_weights_TK).wait().x_RD)
    return max(e.abs().max().item() for e in errors)


def test_raw_verbs_of_two_microbatches_under_way_at_once():
    assert max(run_ranks(4, _two_under_way)) < 1e-12


def _lossy(rank: int, world_size: int) -> tuple[float, float]:
    mesh = Mesh(MeshConfig(ep=world_size, ranks_per_node=2, world=world_size))
    problem = make_problem(6, NUM_EXPERTS, TOP_K, 130, rank)
    x = problem.x_TD.float()
    results = {}
    for name in ("all_to_all", "two_hop"):
        dispatcher = DISPATCHERS[name](mesh, DispatchConfig(NUM_EXPERTS, dispatch_dtype="fp8"))
        routed = dispatcher.dispatch(x, problem.topk_idx_TK, problem.topk_weights_TK)
        results[name] = dispatcher.combine(routed.x_RD, routed.handle) / TOP_K
    across_dispatchers = (results["all_to_all"] - results["two_hop"]).abs().max().item()
    rounded = decode(encode(x, "fp8"), 130, x.dtype, "fp8")
    assert not torch.equal(rounded, x)
    return across_dispatchers, (results["two_hop"] - rounded).abs().max().item()


def test_fp8_rounds_once_whatever_the_way():
    assert max(max(errors) for errors in run_ranks(4, _lossy)) < 1e-6


def _sabotaged(rank: int, world_size: int) -> float:
    mesh = Mesh(MeshConfig(ep=world_size, ranks_per_node=2, world=world_size))
    dispatcher = DISPATCHERS["two_hop"](mesh, DispatchConfig(NUM_EXPERTS))
    if rank == 1:  # one rank loses one row of every sum it sends back
        gather = dispatcher._gather
        dispatcher._gather = lambda y_RD, plan: gather(y_RD * (torch.arange(len(y_RD)) > 0).unsqueeze(1), plan)
    problem = make_problem(6, NUM_EXPERTS, TOP_K, HIDDEN, rank)
    return worst_error(dispatcher, mesh, problem, make_experts(NUM_EXPERTS, HIDDEN))


def test_one_lost_row_would_be_seen():
    assert max(run_ranks(4, _sabotaged)) > 1e-3


def test_an_expert_that_does_not_exist_is_refused():
    dispatcher = DISPATCHERS["local"](Mesh(MeshConfig()), DispatchConfig(8))
    with pytest.raises(ValueError, match="topk_idx holds experts 0 to 8, but n_routed_experts=8"):
        dispatcher.dispatch(torch.randn(1, 2), torch.tensor([[0, 8]]), torch.rand(1, 2))


def _refusals(rank: int, world_size: int) -> list[str]:
    mesh = Mesh(MeshConfig(ep=world_size, ranks_per_node=2, world=world_size))
    messages = []
    for name, config in [
        ("local", DispatchConfig(8)),
        ("two_hop", DispatchConfig(10)),
        ("two_hop", DispatchConfig(8, 1 + 2)),
    ]:
        try:
            DISPATCHERS[name](mesh, config)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_meshes_and_experts_that_do_not_fit_are_refused():
    local, experts, groups = run_ranks(4, _refusals)[0]
    assert "dispatcher=local keeps all experts on one rank, but ep=4" in local
    assert "n_routed_experts=10 cannot be shared by ep=4 ranks: use ep=2" in experts
    assert "n_group=3 routing groups do not lie whole on the 2 nodes" in groups


def test_an_unknown_payload_is_refused():
    with pytest.raises(ValueError, match="dispatch_dtype='fp4' is not one of native, fp8, fp8_fp32_sf"):
        DispatchConfig(8, dispatch_dtype="fp4")


def _random_routings(rank: int, world_size: int, ranks_per_node: int, num_examples: int) -> int:
    """The same examples on every rank, drawn by hypothesis from one seed, each against the model's own dispatcher."""
    mesh = Mesh(MeshConfig(ep=world_size, ranks_per_node=ranks_per_node, world=world_size))
    dispatchers = [DISPATCHERS[name](mesh, DispatchConfig(8)) for name in ("all_to_all", "two_hop")]
    scale_E1 = torch.arange(1, 9, dtype=torch.float64).unsqueeze(1)
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    seen = 0

    def run(dispatcher, scale_E1: Tensor, problem: Problem) -> list[Tensor]:
        x, weights = problem.x_TD.clone().requires_grad_(), problem.topk_weights_TK.clone().requires_grad_()
        routed = dispatcher.dispatch(x, problem.topk_idx_TK, weights)
        scale_R1 = scale_E1.repeat_interleave(routed.num_tokens_per_expert_E, 0)
        y = dispatcher.combine((routed.x_RD * scale_R1).tanh() * routed.weights_R.unsqueeze(1), routed.handle)
        return [y.detach(), *torch.autograd.grad(y, (x, weights), problem.gy_TD)]

    @settings(max_examples=num_examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(st.data())
    def check(data) -> None:
        nonlocal seen
        top_k = data.draw(st.integers(1, 5))
        choices = st.lists(st.lists(st.integers(0, 7), min_size=top_k, max_size=top_k), max_size=5)
        routing = data.draw(st.tuples(*[choices] * world_size))[rank]  # an expert may even be chosen twice
        generator = torch.Generator().manual_seed(seen * world_size + rank)
        x, gy = torch.randn(2, len(routing), 3, dtype=torch.float64, generator=generator)
        weights = torch.randn(len(routing), top_k, dtype=torch.float64, generator=generator)
        problem = Problem(x, torch.tensor(routing, dtype=torch.int64).view(-1, top_k), weights, gy)
        wanted = run(LocalDispatcher(8), scale_E1, problem) if routing else [x, x, weights]
        for dispatcher in dispatchers:
            for found, right in zip(run(dispatcher, scale_E1[mine], problem), wanted, strict=True):
                torch.testing.assert_close(found, right, rtol=0, atol=1e-10)
        seen += 1

    check()
    return seen


@pytest.mark.parametrize(("world_size", "ranks_per_node", "num_examples"), [(4, 2, 40)])
def test_random_routings_equal_the_local_dispatcher(world_size, ranks_per_node, num_examples):
    assert run_ranks(world_size, _random_routings, ranks_per_node, num_examples) == [num_examples] * world_size


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(2, 1), (4, 2)])
def test_a_thousand_random_routings_equal_the_local_dispatcher(world_size, ranks_per_node):
    assert run_ranks(world_size, _random_routings, ranks_per_node, 1000) == [1000] * world_size
