"""Pre-training, from the command line to the last checkpoint. It reads as the table of contents of this repository.

torchrun --nproc-per-node=4 launch/pretrain.py model=debug train.steps=300 run.dir=runs/first
mpirun -n 4 python launch/pretrain.py ...          # the same through mpi4py
python launch/pretrain.py ...                      # one rank
"""

from __future__ import annotations

import hydra
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
    from launch.run_folder import open_run_folder, prepare_data
    from launch.trainer import Trainer

    world = distributed.start()
    try:
        prepare_data(config, world)
        trainer = Trainer(config, world)
        with open_run_folder(config, trainer) as run:
            while trainer.step < config.train.steps and not trainer.asked_to_stop():
                record, histograms = trainer.train_step()
                if run.is_evaluation_due(trainer.step):
                    record |= trainer.evaluate()
                run.write(record, histograms)
                if run.is_checkpoint_due(trainer.step):
                    run.save()
            run.finish()
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
