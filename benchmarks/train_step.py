"""Tokens per second of a training step, against `transformers`' DeepseekV3 on the same machine, in turn, in one run.

    python benchmarks/train_step.py [--seconds 20] [--out train_step.json]

Same configuration (about 24M parameters: 5 layers, hidden 320, 16 experts or 64 finer ones, top-4), same weights, same
tokens (1 x 512), same dtype, one thread. A step is forward, backward and a fused AdamW update, for both. The two run in
turn, so that whatever else the machine does hits both; the ratio is the median over turns, its spread the quartiles.
The share of peak is a step's FLOPs (model.config's count, causal) over the time, against the best matmul of the same
dtype.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from infra.optim import Bucket, make_adamw, update
from model.config import ModelConfig
from model.hf import to_hugging_face_config
from model.transformer import Transformer, init_model_

LENGTH = 512
LR, BETAS = 1e-4, (0.9, 0.95)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_config(num_experts: int) -> ModelConfig:
    """About 24M parameters however many experts: more of them are finer."""
    return ModelConfig(
        vocab_size=7168,
        hidden_size=320,
        intermediate_size=1024,
        moe_intermediate_size=4096 // num_experts,
        num_hidden_layers=5,
        num_nextn_predict_layers=0,  # transformers builds none
        num_attention_heads=8,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=num_experts,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        aux_loss_alpha=0.0,  # nor a balance loss
        max_position_embeddings=2048,
        initializer_range=0.02,
    )


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few large square products."""
    best = 0.0
    for n in (512, 1024, 2048):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        a @ b
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def our_step_of(model: Transformer, dtype: torch.dtype, loss_of: Callable[[], Tensor]) -> Callable[[], float]:
    """A training step as `launch/pretrain.py` makes it, here with everything in one dtype: linear layers add into flat
    gradients, and one fused AdamW updates flat weights."""
    weights = dict(model.named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    bucket = Bucket(shapes, 0.1, dtype, dtype, torch.device("cpu"))
    for name, param in bucket.params.items():
        bucket.fill(name, weights[name].detach())
        path, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(path), leaf, param)
    optimizer = make_adamw([bucket], LR, BETAS, eps=1e-8)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        update([bucket], optimizer, LR)
        return loss.item()

    return step


def their_step_of(model: torch.nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], float]:
    """A training step as PyTorch's users write it, with the fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0.1, fused=True)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def in_turn(ours: Callable[[], float], theirs: Callable[[], float], seconds: float) -> tuple[list[float], list[float]]:
    """Times of each, turn about, until the time is up."""
    for step in (ours, theirs, ours, theirs):
        step()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for step, log in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            step()
            log.append(time.perf_counter() - start)
    return times


def compare(num_experts: int, precision: str, seconds: float) -> dict[str, object]:
    """One row of the table."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config, dtype = model_config(num_experts), DTYPES[precision]
    ours = init_model_(Transformer(config), seed=0)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hugging_face_config(config)))
    theirs.load_state_dict(ours.state_dict())  # in memory, transformers stacks its experts as we do
    ours, theirs = ours.to(dtype), theirs.to(dtype).train()
    text = torch.randint(config.vocab_size, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    tokens, labels = text[:, :-1], text[:, 1:]
    our_step = our_step_of(ours, dtype, lambda: ours.losses(tokens, labels, num_tokens=LENGTH, num_sequences=1).lm_loss)
    their_step = their_step_of(theirs, lambda: theirs(tokens, labels=labels, shift_labels=labels, use_cache=False).loss)
    first = our_step(), their_step()
    if abs(first[0] - first[1]) > 2e-2:
        raise ValueError(f"the two models do not agree: losses {first[0]:.4f} and {first[1]:.4f} at the first step")
    peak = matmul_peak(dtype)
    our_times, their_times = in_turn(our_step, their_step, seconds)
    ratios = [b / a for a, b in zip(our_times, their_times, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    flops = config.flops_per_token(causal=True, sequence_length=LENGTH) * LENGTH

    def speed(times: list[float]) -> dict[str, float]:
        median = statistics.median(times)
        return {"tokens_per_second": LENGTH / median, "share_of_peak": flops / median / peak}

    return {
        "precision": precision,
        "num_experts": num_experts,
        "num_params": sum(p.numel() for p in ours.parameters()),
        "turns": len(ratios),
        "ours": speed(our_times),
        "transformers": speed(their_times),
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        "matmul_peak_gflops": peak / 1e9,
        "first_losses": first,
    }


def cpu_name() -> str:
    """The processor's name, where the machine tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the four comparisons")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--precision", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("precision experts  params   ours tok/s  peak   transformers tok/s  peak   ratio (quartiles)")
    for precision in args.precision:
        for num_experts in args.experts:
            row = compare(num_experts, precision, args.seconds)
            rows.append(row)
            ours, theirs, (low, high) = row["ours"], row["transformers"], row["ratio_quartiles"]
            print(
                f"{precision:9} {num_experts:7} {row['num_params'] / 1e6:6.1f}M {ours['tokens_per_second']:12,.0f} "
                f"{ours['share_of_peak']:5.0%} {theirs['tokens_per_second']:20,.0f} {theirs['share_of_peak']:5.0%} "
                f"{row['ratio']:7.2f} ({low:.2f} to {high:.2f})",
                flush=True,
            )
    if args.out:
        hardware = {"cpu": cpu_name(), "threads": 1, "torch": torch.__version__}
        args.out.write_text(
            json.dumps({"date": str(datetime.date.today()), "hardware": hardware, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
