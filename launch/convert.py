"""Converts checkpoints: Hugging Face's to one that training continues from, and training's to one `transformers` loads.

    python launch/convert.py source=DeepSeek-V3 target=runs/v3/checkpoints
    python launch/convert.py source=runs/v3/checkpoints/step_1000 target=exported dtype=bfloat16

The source says which way: a folder with config.json is Hugging Face's (safetensors, FP8 blocks or BF16), one with
index.json is ours, and of a run folder the newest checkpoint is taken. Training then starts from `step_0` of the
target, its moments zero. `dtype` is that of the exported weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor

from infra import checkpoint
from launch.errors import one_line_errors
from model.config import ModelConfig
from model.hf import HuggingFaceCheckpoint, write_hugging_face
from model.transformer import Transformer
from parallel import state
from parallel.config import check_choice

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass
class ConvertConfig:
    """Folders, which weights are exported (`master`, or `ema`, their moving average), and their dtype."""

    source: str = MISSING
    target: str = MISSING
    weights: str = "master"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, state.WEIGHTS)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is '{self.dtype}'; known: {', '.join(DTYPES)}")


def names_and_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter and buffer of the whole model, without building it."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


def from_hugging_face(source: Path, root: Path) -> Path:
    """Writes `root/step_0`: master weights and routing biases from `source`; moments are zero before the first step.

    Raises:
        ValueError: where the source is damaged or holds another model than its config.json says.
    """
    published = HuggingFaceCheckpoint(source)
    tensors: dict[str, Tensor] = {}
    for name, shape in track(names_and_shapes(published.config).items(), description="reading"):
        tensor = published.tensor(name)
        if tensor.shape != shape:
            raise ValueError(f"{source}: {name} is {tuple(tensor.shape)}, but its config.json makes it {tuple(shape)}")
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if name.endswith("e_score_correction_bias"):
            tensors[f"bias/{name}"] = tensor
            continue
        for key, part in _taken_apart(name, tensor):
            tensors[f"master/{key}"] = part
    meta = {"samples": 0, "tokens": 0, "model": asdict(published.config)}
    return checkpoint.save(root, 0, tensors, meta, keep=1 << 30)


def to_hugging_face(source: Path, target: Path, dtype: torch.dtype, weights: str = "master") -> None:
    """Writes `target` from the weights of a training checkpoint.

    Raises:
        CheckpointError: where `source` is none, or damaged. ValueError: where `target` exists.
    """
    ours = checkpoint.Checkpoint(source)
    ours.verify()
    config = state.model_config(ours)
    shapes = names_and_shapes(config)
    names = track(shapes.items(), description="writing")
    tensors = ((n, state.whole_tensor(ours, n, shape, weights)) for n, shape in names)
    write_hugging_face(target, config, tensors, dtype)


def _taken_apart(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A training checkpoint holds each expert under its number."""
    if ".mlp.experts." not in name:
        yield name, tensor
        return
    stem, leaf = name.rsplit(".", 1)
    for e, expert in enumerate(tensor):
        yield f"{stem}.{e}.{leaf}", expert


ConfigStore.instance().store(name="convert_schema", node=ConvertConfig)


@one_line_errors()
@hydra.main("pkg://conf", "convert", version_base="1.3")
@one_line_errors()
def main(composed: DictConfig) -> None:
    config = cast(ConvertConfig, OmegaConf.to_object(composed))
    source, target = Path(config.source), Path(config.target)
    if (source / "config.json").exists():
        print(f"wrote {from_hugging_face(source, target)}")
        return
    ours = source if (source / "index.json").exists() else checkpoint.newest(source / "checkpoints")
    if ours is None:
        raise ValueError(
            f"source={source} is no checkpoint: it has neither config.json (Hugging Face's) nor index.json (a run's "
            "step_<n>), and is no run folder with checkpoints"
        )
    to_hugging_face(ours, target, DTYPES[config.dtype], config.weights)
    print(f"wrote {target} from {ours}")


if __name__ == "__main__":
    main()
