"""The training loop: build, step, evaluate, save - with no branch on how the run is laid out.

A step is: take the batch, let the executor run its schedule, sum the gradients, clip, update, move the routing biases,
and write down one flat record. One rank or many, one pipeline or none, go through the same lines.
"""

from __future__ import annotations

import math
import resource
import signal
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist

from conf.schema import Config
from infra import checkpoint, lr
from infra.data import TokenDataset, sample_indexes
from infra.distributed import World, largest, largest_of_each
from infra.ema import Ema
from infra.optim import Reduction, clip_gradients, discard_gradients, global_grad_norm, update
from infra.saver import Saver
from infra.spike import LossHistory, pass_over
from infra.watchdog import Watchdog
from launch.checked_mesh import checked_mesh
from model.moe import updated_bias
from parallel import state
from parallel.expert.traffic import load_figures
from parallel.mesh import Group, Mesh
from parallel.parallelize import parallelize
from parallel.pipeline.executor import Executor
from parallel.pipeline.measure import bubble_fraction, clock_offset
from parallel.pipeline.p2p import P2P
from parallel.pipeline.passes import forward_only, lower
from parallel.pipeline.stage import BatchScale
from parallel.straggler import gathered, own_times, straggler
from parallel.zero import OPTIMIZERS

Record = dict[str, float]

# What a run may change about a model whose weights it goes on with: how it is trained, and how positions are stretched
# (V3 added YaRN when it extended the context).
_MAY_CHANGE = {
    *("initializer_range", "aux_loss_alpha", "seq_aux", "bos_token_id", "eos_token_id"),
    *("rope_scaling", "max_position_embeddings", "num_key_value_heads"),
}

_FAILED = 2  # a rank could not write its part of a checkpoint; more than its being asked to stop, which is 1


class Trainer:
    """One run on this rank. Building one is collective; so are `train_step`, `evaluate`, `save`.

    step, samples, tokens: what is done so far. skipped_steps: how many of the steps were not taken because a number was
    not finite, the last `skipped_in_a_row` among them. losses: of the last steps, by which spikes are told.
    Raises ValueError in one line where the config contradicts itself.
    """

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        train, parallel = config.train, config.parallel
        mesh_config = checked_mesh(config, world.size)
        self._schedule = lru_cache(maxsize=None)(parallel.make_schedule)
        self.mesh = Mesh(mesh_config, world.timeout)
        self.total_samples = lr.total_samples(train.steps, train.global_batch_size, train.batch_ramp)
        self.train_data = self._open("train", config.data.fim_rate)
        self.held_out = self._open("held_out", 0.0) if train.eval_samples else None
        self.replica = parallelize(
            config.model,
            parallel,
            self.mesh,
            self._schedule(self._num_microbatches(train.global_batch_size)),
            precision=config.precision,
            device=world.device,
            seed=train.seed,
            weight_decay=config.optim.weight_decay,
            microbatch=(train.microbatch_size, config.data.sequence_length),
        )
        buckets, optim = self.replica.buckets, config.optim
        make_optimizer = OPTIMIZERS[parallel.zero_backend]
        self.optimizer = make_optimizer(buckets, optim.lr.peak, optim.betas, optim.eps, optim.moments)
        # Each copy of a parameter averages its share, so that all ranks together hold one average.
        averaged = [bucket.share_of(bucket.master.data) for bucket in buckets] if train.ema_decay else []
        self.ema = Ema(averaged, train.ema_decay)
        pp = self.mesh.pp
        up, down = self.mesh.group(mesh_config.partition("pp")).pg, self.mesh.group(mesh_config.partition("pp")).pg
        everyone = tuple(range(world.size))
        self._everyone = Group(everyone, world.rank, dist.group.WORLD if world.size > 1 else None)
        self._p2p = P2P(pp.ranks, pp.rank, up, down, world.device)
        self.clock_offset = clock_offset(pp)
        self.executor: Executor | None = None  # of the last training step
        self._executor = lru_cache(maxsize=8)(self._make_executor)
        self._running: Executor | None = None
        self._load_time = self._update_time = 0.0
        self.step, self.samples, self.tokens = 0, 0, 0
        self.skipped_steps, self.skipped_in_a_row = 0, 0
        self.losses = LossHistory(config.spike)
        self.saver = Saver()
        self._asked_to_stop = False
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def train_step(self) -> tuple[Record, dict[str, torch.Tensor]]:
        """One optimizer step; returns its record, and histograms by name."""
        config, started = self.config, time.perf_counter()
        share = self.samples / self.total_samples
        size = lr.batch_size(self.samples, self.total_samples, config.train.global_batch_size, config.train.batch_ramp)
        rate = lr.learning_rate(config.optim.lr, self.step, config.train.steps, share)
        weights = self._run(self.train_data, self.samples, size, share, training=True)
        assert self.executor is not None
        reduction = Reduction(self.replica.buckets)  # travels while other pipeline ranks still compute
        sums, load_LE = self._gather(weights, size)
        times = self._times(*reduction.wait())
        norm = global_grad_norm(self.replica.buckets, self.world.size)
        reduced = time.perf_counter()
        if math.isfinite(norm) and math.isfinite(sums["loss"]):  # sums over all ranks: all decide alike
            self.skipped_in_a_row = 0
            clip_gradients(self.replica.buckets, norm, config.optim.clip)
            self.ema.before_step()
            update(self.replica.buckets, self.optimizer, rate)
            self.ema.update()  # behind the next step
            if share < config.train.bias_stop_share:
                bias_LE = self.replica.bias_LE  # a layer that routes nothing has a load, and so a change, of zero
                bias_LE.copy_(updated_bias(bias_LE, load_LE.to(bias_LE.device), config.train.bias_update_speed))
            self.losses.add(sums["lm_loss"], self.samples, self.samples + size)
        else:
            self.skipped_steps, self.skipped_in_a_row = self.skipped_steps + 1, self.skipped_in_a_row + 1
            discard_gradients(self.replica.buckets)
            self.losses.has_spiked = False
        self._update_time = time.perf_counter() - reduced
        self.step, self.samples = self.step + 1, self.samples + size
        num_tokens = size * config.data.sequence_length
        self.tokens += num_tokens
        step_time = time.perf_counter() - started
        record = {
            "step": self.step,
            **sums,
            **self.replica.dispatcher.traffic.record(self._everyone),
            **times,
            "nats_per_byte": sums["lm_loss"] / self.train_data.bytes_per_token,
            "grad_norm": norm,
            "skipped_steps": self.skipped_steps,
            "lr": rate,
            "batch_size": size,
            "tokens": self.tokens,
            "step_time": step_time,
            "tokens_per_second": num_tokens / step_time,
            "bubble": bubble_fraction(self.executor, self.mesh.pp, self.clock_offset),
            "peak_memory_gb": largest(self._peak_memory_gb()),
        }
        histograms = {}
        moe_layers = load_LE.sum(1).nonzero().flatten().tolist()
        if moe_layers:
            record |= load_figures(load_LE[moe_layers], self.mesh.config)
            histograms = {f"expert_load/layer_{n}": load_LE[n] for n in moe_layers}
        for n in self.replica.biased_layers:
            histograms[f"routing_bias/layer_{n}"] = self.replica.bias_LE[n]
        if self.config.parallel.force_balance:
            record["force_balance"] = 1.0  # of the dispatch figures only: loads are the router's own
        record["max_routing_bias"] = self.replica.bias_LE.abs().max().item()
        return record, histograms

    def _times(self, gradient: float, exposed: float) -> Record:
        """Seconds of the step: communication by kind, and who was waited for (`straggler_*`).

        Of communication, `comm_time_*` is how long it took and `comm_exposed_*` how long it kept a rank waiting, means
        over all ranks; what is not exposed was hidden behind computing - of gradients, behind that of pipeline ranks
        that end later, and behind the gathering of losses. `pipeline_wait` is the time in receives: travel, or work
        that a neighbour had not done yet.
        """
        assert self.executor is not None
        waits = self.replica.dispatcher.times.waits
        own = own_times(self.executor.spans, waits, self._load_time, self._update_time)
        times = self.replica.dispatcher.times.take()
        times |= {"comm_time_gradient": gradient, "comm_exposed_gradient": exposed}
        times["pipeline_wait"] = self.executor.waited
        rows = gathered([*times.values(), *own.values()], self.world.rank, self.world.size)
        means = rows[:, : len(times)].mean(0).tolist()
        return dict(zip(times, means, strict=True)) | straggler(rows[:, len(times) :])

    def position(self) -> str:
        """Where this rank stands in its program, for people: the slot at hand, marked in the grid."""
        return self._running.position if self._running else "it is between two passes of its program"

    @torch.no_grad()
    def evaluate(self) -> Record:
        """Losses over the first `train.eval_samples` held-out samples, by the same executor; {} where that is 0."""
        data = self.held_out
        if data is None:
            return {}
        size = self.config.train.eval_samples
        sums, _ = self._gather(self._run(data, 0, size, share=0.0, training=False), size)
        self.replica.dispatcher.times.take()  # these two are a training step's; they start anew
        self.replica.dispatcher.traffic.record()
        return {"eval_loss": sums["lm_loss"], "eval_nats_per_byte": sums["lm_loss"] / data.bytes_per_token}

    def _run(self, data: TokenDataset, first_sample: int, size: int, share: float, training: bool) -> Record:
        """One pass of the schedule over `size` samples; returns the weights of the losses."""
        started, config, mesh = time.perf_counter(), self.config, self.mesh.config
        length, model = config.data.sequence_length, config.model
        num_microbatches = self._num_microbatches(size)
        indexes = sample_indexes(first_sample, num_microbatches, config.train.microbatch_size, self.mesh.at.dp, mesh.dp)
        if training:
            indexes = pass_over(indexes, self.losses.left_out)
        tokens_MBL = data.batch(indexes, length).to(self.world.device)
        documents = None
        if config.data.document_mask:
            ids = [[torch.from_numpy(data.document_ids(i, length)) for i in row] for row in indexes.tolist()]
            documents = torch.stack([torch.stack(row) for row in ids]).to(self.world.device)
        is_late = share >= config.train.mtp_late_share
        mtp_weight = config.train.mtp_loss_weight_late if is_late else config.train.mtp_loss_weight
        weights = {
            "lm_loss": 1.0,
            "mtp_loss": mtp_weight / max(1, model.num_nextn_predict_layers),
            "balance_loss": model.aux_loss_alpha / size,
        }
        for stage in self.replica.stages.values():
            stage.begin(tokens_MBL, BatchScale(size * length, weights), training, documents)
        executor = self._running = self._executor(num_microbatches, training)
        self._load_time = time.perf_counter() - started
        executor.step()
        self._running = None
        if training:
            self.executor = executor
        return weights

    def _gather(self, weights: Record, size: int) -> tuple[Record, torch.Tensor]:
        """Losses of the whole batch, and tokens per expert by layer: sums over all ranks, since each microbatch and
        layer was counted on exactly one pipeline rank.
        """
        model = self.config.model
        num_layers = model.num_hidden_layers + model.num_nextn_predict_layers
        load_LE = torch.zeros(num_layers, model.n_routed_experts, dtype=torch.int64)
        sums = torch.zeros(len(weights), dtype=torch.float64)
        for stage in self.replica.stages.values():
            for i, name in enumerate(weights):
                sums[i] += float(stage.losses.get(name, 0.0))
            for layer, load in stage.loads.items():
                load_LE[layer] += load.cpu()
        if self.world.size > 1:
            dist.all_reduce(sums)
            dist.all_reduce(load_LE)
        losses = dict(zip(weights, sums.tolist(), strict=True))
        total = sum(weights[name] * value for name, value in losses.items())
        depths = max(1, model.num_nextn_predict_layers)
        losses["mtp_loss"] /= depths
        losses["balance_loss"] /= size * max(1, int((load_LE.sum(1) > 0).sum()))
        return {"loss": total, **losses}, load_LE

    def save(self, root: Path, wait: bool = True) -> Path:
        """Writes a checkpoint of this moment under `root`, and returns where; before it is there, unless it waits."""
        meta = {
            "samples": self.samples,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "averaged_steps": self.ema.num_updates,
            "losses": self.losses.state(),
            "model": asdict(self.config.model),
            "options": _noted_options(self.config),
        }
        self.saver.save(root, self.step, self._saved(), meta, self.config.checkpoint.keep, wait)
        return root / f"step_{self.step}"

    def reserve_copies(self) -> None:
        """Makes room for a copy of this rank's part of a checkpoint, for saves that training does not wait for."""
        self.saver.reserve(self._saved())

    def _saved(self) -> dict[str, torch.Tensor]:
        return state.saved(self.replica, self.optimizer, self.ema, self.world.rank)

    def load(self, folder: Path) -> list[str]:
        """Continues from a checkpoint, made under any layout. Raises CheckpointError for another model's.

        Returns which of the noted options are no longer what they were: "precision=fp8 (was bf16)".
        """
        saved = checkpoint.Checkpoint(folder)
        check_same_model(saved, asdict(self.config.model))
        new = {"skipped_steps": 0, "skipped_in_a_row": 0, "losses": LossHistory(self.config.spike).state()}
        meta = {**new, **saved.meta}  # imports have none of these
        self.step, self.samples, self.tokens, self.skipped_steps, self.skipped_in_a_row = (
            meta[name] for name in ("step", "samples", "tokens", "skipped_steps", "skipped_in_a_row")
        )
        # A run that gave up gets one more step: its options may be others now.
        self.skipped_in_a_row = min(self.skipped_in_a_row, self.config.train.max_skipped_steps - 1)
        self.losses.load(meta["losses"])
        taken = self.step - self.skipped_steps
        self.ema.num_updates = meta.get("averaged_steps", taken)
        state.load(saved, self.replica, self.optimizer, self.ema, taken)
        were = meta.get("options", {})
        return [f"{k}={v} (was {were[k]})" for k, v in _noted_options(self.config).items() if were.get(k, v) != v]

    def asked_to_stop(self, watch: Watchdog) -> bool:
        """Whether any rank has received SIGTERM; collective, so that all stop after the same step. In the same message
        the ranks tell each other how long things took.

        Raises OSError, on all ranks, where a checkpoint could not be written.
        """
        what, *took = largest_of_each([_FAILED if self.saver.has_failed else self._asked_to_stop, *watch.took()])
        watch.learn(took)
        if what == _FAILED:
            self.saver.wait()
        return bool(what)

    def _on_sigterm(self, *_: object) -> None:
        self._asked_to_stop = True

    def _open(self, split: str, fim_rate: float) -> TokenDataset:
        """One split of the data. Raises DataError now, not after hours, where it holds less than one sample."""
        data = self.config.data
        dataset = TokenDataset(
            data.path,
            split,
            seed=self.config.train.seed,
            fim_rate=fim_rate,
            vocab_size=self.config.model.vocab_size,
            verify=data.verify and split == "train" and self.world.is_main,  # once, and it reads both splits
        )
        dataset.samples_per_epoch(data.sequence_length)
        return dataset

    def _num_microbatches(self, size: int) -> int:
        return size // (self.config.train.microbatch_size * self.mesh.config.dp)

    def _make_executor(self, num_microbatches: int, training: bool) -> Executor:
        schedule = self._schedule(num_microbatches)
        if not training:
            schedule = forward_only(schedule)
        rank = self.mesh.at.pp
        return Executor(schedule, lower(schedule).programs[rank], rank, self.replica.stages, self._p2p)

    def _peak_memory_gb(self) -> float:
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _noted_options(config: Config) -> dict[str, str | int]:
    """What a run may go on with another value of, and whoever compares its losses before and after should know."""
    precision = config.precision
    return {
        "precision": precision.name,
        "precision.recipe": precision.recipe,
        "precision.backend": precision.backend,
        "optim.moments": config.optim.moments,
        "data.sequence_length": config.data.sequence_length,
    }


def check_same_model(saved: checkpoint.Checkpoint, model: dict) -> None:
    """Raises CheckpointError naming the first key in which the checkpoint's model is another."""
    for key, value in model.items():
        if key not in _MAY_CHANGE and saved.meta["model"].get(key) != value:
            raise checkpoint.CheckpointError(
                f"{saved.folder} holds another model: its {key} is {saved.meta['model'].get(key)}, "
                f"but model.{key}={value}; use another run.dir, or the model of this one"
            )
