"""Pre-training, from the command line to the last checkpoint. It reads as the table of contents of this repository.

torchrun --nproc-per-node=4 launch/pretrain.py model=debug train.steps=300 run.dir=runs/first
mpirun -n 4 python launch/pretrain.py ...          # the same through mpi4py
python launch/pretrain.py ...                      # one rank
python launch/pretrain.py -m optim.lr.peak=1e-3,3e-3 run.dir=runs/sweep    # a sweep starts the ranks of its runs itself
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conf.schema import Config, register
from launch.errors import one_line_errors
from launch.sweep import is_asked, is_sweep, leave_row, row_or_note, sweep, swept_words
from launch.train_ranks import train_ranks

register()


@one_line_errors()
@hydra.main("pkg://conf", "pretrain", version_base="1.3")
@one_line_errors()
def main(settings: DictConfig) -> None:
    if is_sweep():
        return leave_row(row_or_note(train_ranks, settings, swept_words()))
    config: Config = OmegaConf.to_object(settings)  # type: ignore[assignment]
    from infra import distributed
    from launch.fit import alone_in, fit, open_run_folder, resume, with_data
    from launch.trainer import Trainer

    world = distributed.start()
    config = with_data(config, world)
    trainer = Trainer(config, world)
    with alone_in(Path(config.run.dir), world):
        resume(trainer)
        if world.is_main and trainer.step < config.train.steps:
            open_run_folder(config, list(HydraConfig.get().overrides.task))
        fit(trainer)
    distributed.stop()


if __name__ == "__main__":
    if is_asked(sys.argv):
        sweep(main, "run.dir", "runs", by=("eval_nats_per_byte", "loss"), scatter=("tokens_per_second", "loss"))
    else:
        main()
