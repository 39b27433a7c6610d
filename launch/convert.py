"""Converts checkpoints: Hugging Face's to one that training continues from, and training's to one `transformers` loads.

    python launch/convert.py source=DeepSeek-V3 target=runs/v3/checkpoints
    python launch/convert.py source=runs/v3/checkpoints/step_1000 target=exported dtype=bfloat16

The source says which way: a folder with config.json is Hugging Face's (safetensors, FP8 blocks or BF16), one with
index.json is ours, and of a run folder the newest checkpoint is taken. An import goes into `checkpoints` of a run
folder, whichever of the two the target names. Training then starts from its `step_0`, the moments zero; an older
`step_0` is replaced only with `overwrite=true`. The tokenizer goes with the weights, either way: into the run folder,
and out of it as the files that `AutoTokenizer` reads. `dtype` is that of the exported weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from infra import checkpoint
from infra.tokenizer import SPECIAL_TOKENS, Tokenizer, added_tokens, check_fits, published_files, tokenizer_from_json
from launch.errors import one_line_errors
from launch.files import save
from model.config import ModelConfig
from model.hf import HuggingFaceCheckpoint, write_hugging_face
from model.transformer import Transformer
from parallel import state
from parallel.config import check_choice

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass
class ConvertConfig:
    """Folders; what is exported: `weights`, `master` or `ema` (their moving average), and their dtype; whether an
    import may replace another."""

    source: str = MISSING
    target: str = MISSING
    weights: str = "master"
    dtype: str = "bfloat16"
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, state.WEIGHTS)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is '{self.dtype}'; known: {', '.join(DTYPES)}")


def names_and_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter and buffer of the whole model, without building it."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


def checkpoints_of(target: Path) -> Path:
    """Where a run looks for its checkpoints: `target` itself only where it is called so and is no run folder."""
    is_run = any((target / name).exists() for name in ("config.yaml", "metrics.jsonl"))
    return target / "checkpoints" if is_run or target.resolve().name != "checkpoints" else target


def from_hugging_face(source: Path, root: Path, overwrite: bool = False) -> Path:
    """Writes `root/step_0`: master weights and routing biases from `source`; moments are zero before the first step.

    The source's tokenizer.json, where it has one, is copied to the run folder around `root`.

    Raises:
        ValueError: where the source, or its tokenizer, is damaged or of another model than its config.json says, where
            `root/step_0` exists and `overwrite` does not allow to replace it, or where `root` holds a later step.
    """
    checkpoint.restore_replaced(root)  # else a kill while one was replaced makes it look as if there were none
    if (later := checkpoint.folders(root)) and checkpoint.step_of(later[-1]) > 0:
        raise ValueError(
            f"{later[-1]} exists, and training would go on from it, not from step_0: choose another target"
        )
    if (root / "step_0").exists() and not overwrite:
        raise ValueError(f"{root / 'step_0'} exists: choose another target, or replace it with overwrite=true")
    published = HuggingFaceCheckpoint(source)
    tokenizer = _tokenizer(source, published.config, "fetch it again, or remove it to import the weights alone")
    meta = {"samples": 0, "tokens": 0, "model": asdict(published.config)}
    with _bar() as bar:
        shapes = bar.track(names_and_shapes(published.config).items(), description="reading")
        step = checkpoint.save_one_by_one(root, 0, _tensors_of(published, shapes), meta)
    if tokenizer:
        if "eos" not in tokenizer.special:
            warnings.warn(
                f"{source / 'tokenizer.json'} is copied, but has no end-of-document token of a name that is known "
                f"({' '.join(SPECIAL_TOKENS['eos'])}): preparing data and generating need another tokenizer",
                stacklevel=2,
            )
        save(root.parent / "tokenizer.json", tokenizer.to_json())
    return step


def to_hugging_face(source: Path, target: Path, dtype: torch.dtype, weights: str = "master") -> bool:
    """Writes `target` from the weights of a training checkpoint, and the tokenizer of its run folder; returns whether
    that has one.

    Raises:
        CheckpointError: where `source` is none, or damaged. ValueError: where `target` exists, or for a damaged
        tokenizer.
    """
    ours = checkpoint.Checkpoint(source)
    ours.verify()
    config = state.model_config(ours)
    tokenizer = _tokenizer(source.parent.parent, config, "put the one of its data there, or remove it")
    files: dict[str, str] = {}
    if tokenizer:
        special = tokenizer.special | (_ids_of_import(config, tokenizer) if not ours.meta["tokens"] else {})
        files = published_files(tokenizer, special)
        config = replace(config, bos_token_id=special.get("bos"), eos_token_id=special.get("eos"))
    with _bar() as bar:
        shapes = bar.track(names_and_shapes(config).items(), description="writing")
        tensors = ((name, state.whole_tensor(ours, name, shape, weights)) for name, shape in shapes)
        write_hugging_face(target, config, tensors, dtype, files=files)
    return bool(files)


def _tokenizer(folder: Path, config: ModelConfig, remedy: str) -> Tokenizer | None:
    """Of a run folder or a published model, where it has one. Raises ValueError where the model cannot use it."""
    file = folder / "tokenizer.json"
    try:
        tokenizer = tokenizer_from_json(file.read_text(encoding="utf-8"), "it")
        check_fits(tokenizer, config.vocab_size, "it")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be used ({error}); {remedy}") from None
    return tokenizer


def _ids_of_import(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, int]:
    """Where generation starts and stops by the config.json of an import, as far as the tokenizer has such tokens. After
    training here it is the tokenizer that says so: its eos ended the documents, while the run's config need not know.
    """
    special = added_tokens(tokenizer)
    ids = {"bos": config.bos_token_id, "eos": config.eos_token_id}
    return {name: i for name, i in ids.items() if i is not None and i in special}


def _bar() -> Progress:
    console = Console(stderr=True)
    return Progress(transient=True, console=console, disable=not console.is_terminal)


def _tensors_of(
    published: HuggingFaceCheckpoint, shapes: Iterable[tuple[str, torch.Size]]
) -> Iterator[tuple[str, Tensor]]:
    """By the keys of a training checkpoint, which holds each expert under its number; one at a time."""
    for name, (num_rows, *shape) in shapes:
        if ".mlp.experts." in name:
            stem, leaf = name.rsplit(".", 1)
            for e in range(num_rows):
                yield f"master/{stem}.{e}.{leaf}", _read(published, name, shape, e)
        else:
            kind = "bias" if name.endswith("e_score_correction_bias") else "master"
            yield f"{kind}/{name}", _read(published, name, [num_rows, *shape])


def _read(published: HuggingFaceCheckpoint, name: str, shape: list[int], expert: int | None = None) -> Tensor:
    """In float32, or float64 where it is published so. Raises ValueError where its shape is not that of the model."""
    tensor = published.tensor(name) if expert is None else published.tensor(name, expert, 1)[0]
    if list(tensor.shape) != shape:
        found, wanted = tuple(tensor.shape), tuple(shape)
        raise ValueError(f"{published.folder}: {name} is {found}, but its config.json makes it {wanted}")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


ConfigStore.instance().store(name="convert_schema", node=ConvertConfig)


@one_line_errors()
@hydra.main("pkg://conf", "convert", version_base="1.3")
@one_line_errors()
def main(composed: DictConfig) -> None:
    config = cast(ConvertConfig, OmegaConf.to_object(composed))
    source, target = Path(config.source), Path(config.target)
    if (source / "config.json").exists():
        root = checkpoints_of(target)
        step = from_hugging_face(source, root, config.overwrite)
        print(f"wrote {step}" + ("" if root == target else f": {target} is taken as the run folder, run.dir={target}"))
        return
    ours = source if (source / "index.json").exists() else checkpoint.newest(source / "checkpoints")
    if ours is None:
        raise ValueError(
            f"source={source} is no checkpoint: it has neither config.json (Hugging Face's) nor index.json (a run's "
            "step_<n>), and is no run folder with checkpoints"
        )
    has_tokenizer = to_hugging_face(ours, target, DTYPES[config.dtype], config.weights)
    print(
        f"wrote {target} from {ours}" + ("" if has_tokenizer else "; its run folder has no tokenizer.json to go along")
    )


if __name__ == "__main__":
    main()
