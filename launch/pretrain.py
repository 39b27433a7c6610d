"""Pre-training, from the command line to the last checkpoint. It reads as the table of contents of this repository.

torchrun --nproc-per-node=4 launch/pretrain.py model=debug train.steps=300 run.dir=runs/first
mpirun -n 4 python launch/pretrain.py ...          # the same through mpi4py
python launch/pretrain.py ...                      # one rank
"""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conf.schema import Config, register
from launch.errors import one_line_errors

register()


@one_line_errors()
@hydra.main("pkg://conf", "pretrain", version_base="1.3")
@one_line_errors()
def main(settings: DictConfig) -> None:
    config: Config = OmegaConf.to_object(settings)  # type: ignore[assignment]
    from infra import distributed
    from launch.fit import fit, open_run_folder, resume, with_data
    from launch.trainer import Trainer

    world = distributed.start()
    config = with_data(config, world)
    trainer = Trainer(config, world)
    resume(trainer)
    if world.is_main:
        open_run_folder(config, settings, list(HydraConfig.get().overrides.task))
    fit(trainer)
    distributed.stop()


if __name__ == "__main__":
    main()
