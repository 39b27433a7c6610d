"""Which numbers a run computes with. No torch.

fp64   for verification: everything in FP64
fp32   everything in FP32
bf16   BF16 computing; FP32 master weights, gradients and moments
fp8    as bf16, with the linear layers' products in FP8 (infra/fp8)
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.fp8.recipe import RECIPES

PRECISIONS = ("fp64", "fp32", "bf16", "fp8")
FP8_BACKENDS = ("reference", "scaled_mm", "te", "deep_gemm")


@dataclass
class PrecisionConfig:
    """name: see above. backend: what multiplies in FP8. recipe: how operands are cast, one of `RECIPES`."""

    name: str = "bf16"
    backend: str = "reference"
    recipe: str = "deepseek_v3"

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("precision", self.name, PRECISIONS),
            ("precision.backend", self.backend, FP8_BACKENDS),
            ("precision.recipe", self.recipe, tuple(RECIPES)),
        ):
            if value not in choices:
                raise ValueError(f"{option}={value}: expected one of {', '.join(choices)}")

        if self.backend != "reference" and self.name != "fp8":
            raise ValueError(
                f"precision.backend={self.backend} multiplies in FP8, but precision={self.name}: use precision=fp8"
            )

    @property
    def compute_dtype(self) -> str:
        """Name of the torch dtype of parameters and activations."""
        return {"fp64": "float64", "fp32": "float32"}.get(self.name, "bfloat16")

    @property
    def accumulation_dtype(self) -> str:
        """Name of the torch dtype of gradients, master weights and moments."""
        return "float64" if self.name == "fp64" else "float32"
