"""The whole configuration of a training run: one dataclass a group, each beside the code that it configures.

Hydra composes the YAML files of this folder into these classes; `OmegaConf.to_object` turns the result into plain
objects, whose `__post_init__` says what is wrong in one line. Every function then receives its own slice; nothing
changes a config afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from infra.data import DataConfig
from infra.lr import BatchRampConfig, LRConfig
from infra.precision import PrecisionConfig
from infra.spike import SpikeConfig
from infra.watchdog import HangConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig, check_choice


@dataclass
class OptimConfig:
    """AdamW and its schedules (V3 report, section 4.2)."""

    lr: LRConfig = field(default_factory=LRConfig)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    moments: str = "fp32"  # fp32, or bf16 as in V3: 4 bytes a parameter less
    weight_decay: float = 0.1  # of matrices; vectors (norms) decay not
    clip: float = 1.0  # global gradient norm; 0: never

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optim.betas={self.betas}: expected two numbers in [0, 1)")
        check_choice("optim.moments", self.moments, ("fp32", "bf16"))
        for name in ("eps", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:  # nan is refused too
                raise ValueError(f"optim.{name}={getattr(self, name)} must be at least 0")


@dataclass
class TrainConfig:
    """Batch, length and losses of a run.

    steps: optimizer steps. global_batch_size, microbatch_size: in sequences; a pipeline runs
    global_batch_size / (dp x microbatch_size) microbatches a step. Shares are of the run's tokens.
    """

    steps: int = 100
    global_batch_size: int = 16
    microbatch_size: int = 1
    batch_ramp: BatchRampConfig = field(default_factory=lambda: BatchRampConfig(start=0))  # 0: none
    seed: int = 0
    mtp_loss_weight: float = 0.3  # lambda, for the first 10 of 14.8 T tokens
    mtp_loss_weight_late: float = 0.1
    mtp_late_share: float = 10 / 14.8
    bias_update_speed: float = 1e-3  # gamma
    bias_stop_share: float = 14.3 / 14.8  # gamma is 0 from there on
    ema_decay: float = 0.0  # of a moving average of the parameters, in CPU memory; 0: none is kept
    eval_every: int = 0  # steps; 0: only at the end
    eval_samples: int = 16  # held-out sequences per evaluation; 0: none is made, and none are needed
    max_skipped_steps: int = 20  # in a row, for numbers that are not finite: then the run gives up
    log_every: int = 10  # steps between console lines where standard output is no terminal

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "microbatch_size", "max_skipped_steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in ("eval_every", "eval_samples", "mtp_loss_weight", "mtp_loss_weight_late", "bias_update_speed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay={self.ema_decay} must be in [0, 1), say 0.999; 0 keeps no average")


@dataclass
class CheckpointConfig:
    """every: steps between checkpoints (0: only at the end). keep: how many stay. resume: go on from the newest.

    asynchronous: training goes on while a copy of its state is written; the last checkpoint is waited for in any case.
    """

    every: int = 0
    keep: int = 2
    resume: bool = True
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.keep < 1 or self.every < 0:
            raise ValueError(
                f"checkpoint.keep={self.keep} must be at least 1, checkpoint.every={self.every} at least 0"
            )


@dataclass
class RunConfig:
    """dir: the run folder. trace: whether a pipeline leaves the timeline of its last step there.

    ranks: processes that a sweep (-m) starts for each of its runs, in run.dir/000 and on; None: parallel.pp x
    parallel.ep.
    """

    dir: str = "runs/pretrain"
    trace: bool = True
    ranks: int | None = None

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("run.dir= is empty: name a folder, such as runs/first")


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    hang: HangConfig = field(default_factory=HangConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.parallel.zero_backend == "deepspeed" and self.precision.compute_dtype != "bfloat16":
            raise ValueError(
                f"parallel.zero_backend=deepspeed computes with BF16 weights, but precision={self.precision.name}: "
                "use precision=bf16 or fp8, or parallel.zero_backend=torch"
            )


def register() -> None:
    """Makes the schema known to Hydra, as `config_schema`."""
    ConfigStore.instance().store("config_schema", node=Config)
