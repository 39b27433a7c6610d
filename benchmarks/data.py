"""How fast samples come out of a token file, and how fast text goes into one.

    python benchmarks/data.py [--out data.json] [--tokens 100000000] [--turns 9]

Out, on one core: samples in the order of training, from a synthetic file of documents of 1000 tokens on average, with
fill-in-the-middle at rate 0.1. *warm*: the file in the page cache, the layouts of its groups of documents in memory.
*cold layouts*: the layout of a group worked out anew for every sample, which is what a file of many billions of tokens
comes to. Each in turn with the least there is to do, a copy of the same number of tokens from the same place in the
file; `over copying` is the ratio of the times (median and quartiles).

In: the standard library's sources as one .jsonl file, by bytes and by a BPE, by one process and by every core in turn.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infra.data import TokenDataset, mix, permute
from infra.prepare import PrepareConfig, TrainBPEConfig, prepare, prepare_default
from infra.token_file import Header, Split, open_token_file, token_dtype
from infra.tokenizer import ByteTokenizer, identity, train_bpe

FIM_RATE = 0.1


def write_synthetic(path: Path, num_tokens: int) -> None:
    """Random tokens in documents of exponentially distributed length."""
    path.mkdir()
    random = np.random.default_rng(0)
    tokenizer = ByteTokenizer()
    ends = np.cumsum(np.maximum(2, random.exponential(1000, num_tokens // 1000)).astype(np.int64))
    tokens = random.integers(0, 256, ends[-1], dtype=np.uint16)
    tokens[ends - 1] = tokenizer.special["eos"]
    tokens.tofile(path / "train.tokens")
    ends.tofile(path / "train.documents")
    for kind in ("tokens", "documents"):
        (path / f"held_out.{kind}").touch()
    header = Header(token_dtype(tokenizer.vocab_size), tokenizer.vocab_size, identity(tokenizer))
    header.train = Split(len(tokens), len(ends), len(tokens) - len(ends))
    (path / "tokenizer.json").write_text(tokenizer.to_json())
    (path / "header.json").write_text(header.to_json())


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def reading(path: Path, turns: int) -> Iterator[dict[str, Any]]:
    data = TokenDataset(path, fim_rate=FIM_RATE)
    for length in (256, 1024, 4096):
        num_samples = min(2_000_000 // length, data.samples_per_epoch(length))
        positions = [permute(i, data.samples_per_epoch(length), mix(0, 0)) * length for i in range(num_samples)]

        def warm(length: int = length, num_samples: int = num_samples) -> None:
            for i in range(num_samples):
                data.sample(i, length)

        def cold(length: int = length, num_samples: int = num_samples) -> None:
            for i in range(num_samples):
                data._layout.cache_clear()
                data.sample(i, length)

        def copy(length: int = length, positions: list[int] = positions) -> None:
            for position in positions:
                data.file.tokens[position : position + length + 1].copy()

        times: dict[str, list[float]] = {"copying": [], "warm": [], "cold layouts": []}
        for turn in range(turns + 1):
            for name, run in (("copying", copy), ("warm", warm), ("cold layouts", cold)):
                elapsed = seconds(run)
                if turn:  # the first warms the page cache
                    times[name].append(elapsed)
        for name, taken in times.items():
            ratios = [a / b for a, b in zip(taken, times["copying"], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            speed = num_samples * length / statistics.median(taken) / 1e6
            row = {"sequence_length": length, "what": name, "mtokens_per_second": speed}
            yield {**row, "over_copying": ratio, "quartiles": [low, high]}


def writing(folder: Path, turns: int) -> Iterator[dict[str, Any]]:
    prepare_default(folder / "stdlib", held_out=0, quiet=True)
    file = open_token_file(folder / "stdlib")
    begins = [0, *file.document_ends[:-1]]
    texts = [file.tokenizer.decode(file.tokens[a : b - 1]) for a, b in zip(begins, file.document_ends, strict=True)]
    source = folder / "stdlib.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "bpe.json").write_text(train_bpe(iter(texts[::10]), 8192).to_json(), encoding="utf-8")
    num_cores = len(os.sched_getaffinity(0))
    for tokenizer in ("byte", str(folder / "bpe.json")):
        times: dict[int, list[float]] = {1: [], num_cores: []}
        for turn in range(turns):
            for workers in times:
                out = folder / f"{turn}-{workers}-{Path(tokenizer).stem}"
                config = PrepareConfig(str(source), str(out), tokenizer, TrainBPEConfig(), workers=workers)
                times[workers].append(seconds(lambda config=config: prepare(config, quiet=True)))  # type: ignore[misc]
        for workers, taken in times.items():
            speed = file.split.num_bytes / statistics.median(taken) / 1e6
            speedup = statistics.median(a / b for a, b in zip(times[1], taken, strict=True))
            yield {"tokenizer": Path(tokenizer).stem, "workers": workers, "mb_per_second": speed, "speedup": speedup}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="size of the synthetic file")
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    figures: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(Path(folder) / "synthetic", args.tokens)
        print(f"samples of {args.tokens:,} tokens, one core   Mtokens/s   over copying")
        figures["reading"] = []
        for row in reading(Path(folder) / "synthetic", args.turns):
            figures["reading"].append(row)
            low, high = row["quartiles"]
            print(
                f"sequence_length={row['sequence_length']:<5} {row['what']:<22} {row['mtokens_per_second']:9.1f}   "
                f"{row['over_copying']:5.2f} ({low:.2f} to {high:.2f})"
            )
        print("\npreparing the standard library     MB/s   over one process")
        figures["writing"] = []
        for row in writing(Path(folder), max(3, args.turns // 3)):
            figures["writing"].append(row)
            print(
                f"{row['tokenizer']:<6} workers={row['workers']:<18} {row['mb_per_second']:6.1f}   {row['speedup']:.2f}"
            )
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
