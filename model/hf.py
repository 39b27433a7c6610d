"""Hugging Face checkpoints of DeepSeek-V2 and V3, in and out: config.json, and safetensors in shards with an index.

Names are the same on both sides but for the routed experts, which a checkpoint stores one by one
(`mlp.experts.7.gate_proj.weight`) and we keep stacked (`mlp.experts.gate_up_proj`). The multi-token prediction layers
follow the main ones; a published file repeats embedding and head in them, which we share.

Published V3 weights are FP8: each 128 x 128 block of a matrix is multiplied by its number in `<name>_scale_inv`. They
are read into whatever dtype is asked for; out go BF16 or wider.

Shapes: E experts, F expert hidden, D model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infra.tensor_file import save_tensors
from model.config import ModelConfig, RopeScaling

BLOCK = 128  # rows and columns that share an FP8 scale
INDEX = "model.safetensors.index.json"
_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")

_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "class": "DeepseekV2ForCausalLM",
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
    },
    "deepseek_v3": {
        "class": "DeepseekV3ForCausalLM",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
    },
}


def to_hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """config.json as a dictionary."""
    family = "deepseek_v3" if config.topk_method == "noaux_tc" else "deepseek_v2"
    published = dataclasses.asdict(config)
    return published | {
        "architectures": [_FAMILIES[family]["class"]],
        "model_type": family,
        "num_key_value_heads": config.num_attention_heads,
        "torch_dtype": "bfloat16",
    }


def from_hugging_face_config(published: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json, whichever generation of `transformers` wrote it.

    Raises:
        ValueError: for a model of another family, or one that this repository cannot build.
    """
    family = published.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"config.json has model_type '{family}'; known: {', '.join(_FAMILIES)}")
    if not published.get("rope_interleave", True):
        raise ValueError("config.json has rope_interleave false; only DeepSeek's interleaved rotary layout is read")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    keys = {
        key: value for key, value in published.items() if (key in known and value is not None) or key == "q_lora_rank"
    }
    for key, default in _FAMILIES[family].items():
        if key != "class":
            keys.setdefault(key, default)
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    keys["rope_theta"] = float(rope.get("rope_theta", published.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys["rope_scaling"] = None if kind == "default" else _rope_scaling(kind, rope)
    keys.setdefault("num_nextn_predict_layers", 0)
    if isinstance(keys.get("eos_token_id"), list):
        keys["eos_token_id"] = keys["eos_token_id"][0]
    return ModelConfig(**keys)


def _rope_scaling(kind: str, rope: Mapping[str, Any]) -> RopeScaling:
    fields = {field.name for field in dataclasses.fields(RopeScaling)} - {"type"}
    return RopeScaling(type=kind, **{key: value for key, value in rope.items() if key in fields and value is not None})


def to_hugging_face_state(name: str, tensor: Tensor, first_expert: int = 0) -> Iterator[tuple[str, Tensor]]:
    """One of our tensors under its published name or, stacked experts, names."""
    match = _EXPERTS.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    for e, expert in enumerate(tensor, start=first_expert):
        if match[2] == "down_proj":
            yield f"{match[1]}.{e}.down_proj.weight", expert
        else:
            gate_FD, up_FD = expert.chunk(2)
            yield f"{match[1]}.{e}.gate_proj.weight", gate_FD
            yield f"{match[1]}.{e}.up_proj.weight", up_FD


def dequantize(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """FP8 blocks times their scales: float32. The last block of rows or columns may be ragged.

    Args:
        weight: (rows, columns), float8; scale_inv: float32, one number per 128 x 128 block.
    Raises:
        ValueError: when there are not as many scales as blocks.
    """
    rows, columns = weight.shape
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    if tuple(scale_inv.shape) != blocks:
        raise ValueError(f"a {rows} x {columns} FP8 matrix has {blocks} blocks, but {tuple(scale_inv.shape)} scales")
    scales = scale_inv.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float() * scales


class HuggingFaceCheckpoint:
    """A folder with config.json and safetensors, read by our names, one tensor at a time.

    Raises:
        ValueError: where the folder is none, a shard is missing or damaged, or it holds another model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = from_hugging_face_config(self._json("config.json"))
        self._open: dict[str, Any] = {}
        self._file_of = self._files()
        if f"model.layers.{self.config.num_hidden_layers}.eh_proj.weight" not in self._file_of:
            self.config.num_nextn_predict_layers = 0  # `transformers` names a depth in config.json but writes none

    def tensor(self, name: str, first_expert: int = 0, num_experts: int | None = None) -> Tensor:
        """The tensor we call `name`; of stacked experts, `num_experts` from `first_expert` on (default: all)."""
        match = _EXPERTS.fullmatch(name)
        if match is None:
            return self._read(name)
        last = self.config.n_routed_experts if num_experts is None else first_expert + num_experts
        leaves = ["down_proj"] if match[2] == "down_proj" else ["gate_proj", "up_proj"]
        return torch.stack(
            [
                torch.cat([self._read(f"{match[1]}.{e}.{leaf}.weight") for leaf in leaves])
                for e in range(first_expert, last)
            ]
        )

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            raise ValueError(f"{self.folder} is not a Hugging Face checkpoint: it has no {name}") from None
        except ValueError as error:
            raise ValueError(f"{self.folder / name} is not JSON: {error}") from None

    def _files(self) -> dict[str, str]:
        if (self.folder / INDEX).exists():
            weight_map = self._json(INDEX)["weight_map"]
            for file in sorted(set(weight_map.values())):
                if not (self.folder / file).exists():
                    raise ValueError(f"{self.folder / file} is missing, though {INDEX} names it; fetch it again")
            return weight_map
        if not (self.folder / "model.safetensors").exists():
            raise ValueError(f"{self.folder} has neither {INDEX} nor model.safetensors")
        return dict.fromkeys(self._shard("model.safetensors").keys(), "model.safetensors")

    def _shard(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.folder / file} is damaged ({error}); fetch it again") from None

    def _get(self, name: str) -> Tensor:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = self._shard(file)
        return self._open[file].get_tensor(name)

    def _read(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise ValueError(f"{self.folder} has no {name}, which its config.json asks for; it holds another model")
        weight = self._get(name)
        scale_name = f"{name}_scale_inv"
        return dequantize(weight, self._get(scale_name)) if scale_name in self._file_of else weight


def write_hugging_face(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 * 10**9,
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes a checkpoint that `transformers` loads: beside `folder`, then renamed, so that it is whole or not there.

    Args:
        tensors: of the whole model under our names, in any order; taken one at a time. Routing biases stay float32.
        files: more that goes into the folder, text by name.
    Raises:
        ValueError: when `folder` exists. OSError: when it cannot be written.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; name another folder, or remove it")
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = shard_bytes = 0

    def flush() -> None:
        nonlocal shard, shard_bytes
        save_tensors(shard, beside / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard, shard_bytes = {}, 0

    try:
        beside.mkdir(parents=True)
        for our_name, our_tensor in tensors:
            for name, tensor in _published(our_name, our_tensor, config):
                keep = tensor.dtype if name.endswith("e_score_correction_bias") else dtype
                stored = tensor.detach().to(keep, copy=True).contiguous()
                if shard and shard_bytes + stored.nbytes > max_shard_bytes:
                    flush()
                shard[name] = stored
                shard_bytes += stored.nbytes
                total += stored.nbytes
        flush()
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            os.rename(beside / f"shard-{i - 1}", beside / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (beside / INDEX).write_text(json.dumps(index, indent=2))
        published = to_hugging_face_config(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
        (beside / "config.json").write_text(json.dumps(published, indent=2))
        for name, text in (files or {}).items():
            (beside / name).write_text(text, encoding="utf-8")
        os.rename(beside, folder)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):  # the folder that was asked for, not the one beside it
            raise OSError(error.errno, error.strerror or str(error), str(folder)) from None
        raise


def _published(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Published names of one of our tensors; embedding and head are repeated in every multi-token prediction layer."""
    yield from to_hugging_face_state(name, tensor)
    copies = {"model.embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}
    if name in copies:
        for k in range(config.num_nextn_predict_layers):
            yield f"model.layers.{config.num_hidden_layers + k}.{copies[name]}", tensor
