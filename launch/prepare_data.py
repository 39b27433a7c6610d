"""Turns text into the memory-mapped token file that training reads.

    python launch/prepare_data.py source=books.jsonl out=data/books
    python launch/prepare_data.py source='src/**/*.py' out=data/code train_bpe.vocab_size=8192
    python launch/prepare_data.py source=web.parquet text_key=content tokenizer=my.json vocab_size=129280 out=data/web
    zcat tales.txt.gz | python launch/prepare_data.py source=- separator="'<|endoftext|>'" out=data/tales

Options: PrepareConfig in infra/prepare.py. Values with brackets, spaces or letters beyond ASCII need a second pair of
quotes, for Hydra, as above. Killed? The same command goes on where it was.
"""

from __future__ import annotations

from typing import cast

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from infra.prepare import PrepareConfig, prepare
from infra.token_file import Header
from infra.wording import counted
from launch.errors import one_line_errors


def summary(path: str, header: Header) -> str:
    """What was made, and how to train on it."""
    train, held_out = header.train, header.held_out
    without = "" if held_out.num_tokens else " train.eval_samples=0"  # nothing to evaluate on
    return (
        f"{path}: {counted(train.num_tokens, 'token')} of {counted(train.num_documents, 'document')} to train on, "
        f"{held_out.num_tokens:,} of {held_out.num_documents:,} held out\n"
        f"vocabulary {header.vocab_size}, {train.bytes_per_token:.3f} bytes of text per token\n"
        f"train on it: python launch/pretrain.py data.path={path} model.vocab_size={header.vocab_size}{without}"
    )


ConfigStore.instance().store("prepare_data_schema", node=PrepareConfig)


@one_line_errors()
@hydra.main("pkg://conf", "prepare_data", version_base="1.3")
@one_line_errors()
def main(composed: DictConfig) -> None:
    config = cast(PrepareConfig, OmegaConf.to_object(composed))
    print(summary(config.out, prepare(config)))


if __name__ == "__main__":
    main()
