"""The trainer against a loop that anyone would write; its histograms and its resume under a pipeline."""

import pytest
import torch

from conf.schema import Config, TrainConfig
from infra import lr
from infra.data import TokenDataset
from infra.distributed import World
from infra.lr import BatchRampConfig
from launch.checked_mesh import check_batches
from launch.trainer import Trainer
from model.moe import updated_bias
from model.transformer import Transformer, init_model_
from parallel.config import ParallelConfig
from tests.launch.runs import TIMES, config, small_data, train
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("trainer"))


def plain_loop(config: Config, num_steps: int) -> list[dict]:
    """One process, whole batches, torch's AdamW: matrices decay, vectors do not."""
    torch.set_default_dtype(torch.float64)
    try:
        model = init_model_(Transformer(config.model), config.train.seed)
    finally:
        torch.set_default_dtype(torch.float32)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": config.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=config.optim.eps)
    samples = TokenDataset(config.data.path, "train", seed=config.train.seed, fim_rate=config.data.fim_rate)
    size, length = config.train.global_batch_size, config.data.sequence_length
    routers = [block.mlp.gate for block in [*model.blocks, *model.mtp] if block.is_moe]
    records = []
    for step in range(num_steps):
        tokens = samples.batch(range(step * size, (step + 1) * size), length)
        losses = model.losses(tokens[:, :-1], tokens[:, 1:], size * length, size)
        mtp_loss = losses.mtp_losses_K.mean()
        total = losses.lm_loss + config.train.mtp_loss_weight * mtp_loss
        (total + config.model.aux_loss_alpha * losses.balance_loss).backward()
        norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
        for p in model.parameters():
            p.grad *= min(1.0, config.optim.clip / norm.item())
        for group in adamw.param_groups:
            group["lr"] = lr.learning_rate(config.optim.lr, step, config.train.steps, step / config.train.steps)
        adamw.step()
        adamw.zero_grad()
        for router, load in zip(routers, losses.load_ME, strict=True):
            router.e_score_correction_bias = updated_bias(
                router.e_score_correction_bias.float(), load, config.train.bias_update_speed
            )
        records.append({"lm_loss": losses.lm_loss.item(), "mtp_loss": mtp_loss.item(), "grad_norm": norm.item()})
    return records


def test_a_step_is_what_a_plain_loop_does(data):
    settings = config(data, steps=8)
    settings.optim.weight_decay = 5.0  # large enough to see what decays
    settings.optim.clip = 0.5  # and what is clipped
    settings.train.bias_update_speed = 0.05
    expected = plain_loop(settings, 6)
    assert max(record["grad_norm"] for record in expected) > 0.5
    for got, want in zip(run_ranks(1, train, settings, 6)[0], expected, strict=False):
        for key, value in want.items():
            assert got[key] == pytest.approx(value, rel=1e-9), f"step {got['step']} {key}"


def _histograms(rank, world_size, config):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    for _ in range(3):
        record, histograms = trainer.train_step()
    return {name: values.tolist() for name, values in histograms.items()}, record["max_routing_bias"]


def test_histograms_are_of_the_whole_model_under_a_pipeline(data):
    """Rank 0 writes them, wherever a layer stands: also those of the last stage and of multi-token prediction."""
    expected = run_ranks(1, _histograms, config(data))[0]
    assert set(expected[0]) == {f"{kind}/layer_{n}" for kind in ("expert_load", "routing_bias") for n in (1, 2, 3, 4)}
    piped = config(data, pp=2, ep=2, schedule="dualpipe", dispatcher="all_to_all")
    for result in run_ranks(4, _histograms, piped):
        assert result == expected
    assert all(any(values) for values in expected[0].values())


def _save_and_go_on(rank, world_size, config, root):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    for _ in range(4):
        trainer.train_step()
    trainer.save(root)
    return [trainer.train_step()[0] for _ in range(4)], [t.tolist() for t in trainer.ema.averages]


def _load_and_go_on(rank, world_size, config, root):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    trainer.load(root / "step_4")
    return [trainer.train_step()[0] for _ in range(4)], [t.tolist() for t in trainer.ema.averages]


@pytest.mark.parametrize(("precision", "moments", "decay"), [("fp32", "fp32", 0.0), ("bf16", "bf16", 0.9)])
def test_resume_is_bit_identical_in_a_ramp_and_a_cosine_under_a_pipeline(data, tmp_path, precision, moments, decay):
    ramp = BatchRampConfig(start=4, share=0.6, multiple_of=4)
    layout = {"pp": 2, "schedule": "dualpipe", "precision": precision}
    settings = config(
        data, steps=9, train={"global_batch_size": 16, "batch_ramp": ramp, "microbatch_size": 2}, **layout
    )
    settings.optim.moments, settings.train.ema_decay = moments, decay
    settings.optim.lr.constant_until = 0.3
    unbroken = run_ranks(2, _save_and_go_on, settings, tmp_path)
    resumed = run_ranks(2, _load_and_go_on, settings, tmp_path)
    records = unbroken[0][0]
    for before, after in zip(records, resumed[0][0], strict=True):
        assert {k: v for k, v in after.items() if k not in TIMES} == {k: v for k, v in before.items() if k not in TIMES}
    assert [averages for _, averages in resumed] == [averages for _, averages in unbroken]
    assert any(averages for _, averages in unbroken) == (decay > 0)
    assert len({record["batch_size"] for record in records}) > 1
    assert len({record["lr"] for record in records}) > 1


def _curve(rank, world_size, config, evaluates):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    records = []
    for _ in range(3):
        records.append(trainer.train_step()[0])
        if evaluates:
            trainer.evaluate()
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def test_nothing_is_learnt_from_what_is_held_out(data):
    settings = config(data)
    assert run_ranks(1, _curve, settings, True) == run_ranks(1, _curve, settings, False)


def _bytes_around_an_evaluation(rank, world_size, config):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    before = trainer.train_step()[0]
    trainer.evaluate()
    after = trainer.train_step()[0]
    return [r["dispatch_bytes_within_nodes"] for r in (before, after)]


def test_an_evaluation_is_not_counted_as_the_next_steps_traffic(data):
    settings = config(data, ep=2, dispatcher="all_to_all", force_balance=True)
    for before, after in run_ranks(2, _bytes_around_an_evaluation, settings):
        assert before == after > 0


def _peak(rank, world_size, config):
    trainer = Trainer(config, World(rank, world_size, torch.device("cpu")))
    trainer._peak_memory_gb = lambda: rank + 1.0  # type: ignore[method-assign]
    return trainer.train_step()[0]["peak_memory_gb"]


def test_peak_memory_is_that_of_the_fullest_rank(data):
    assert run_ranks(2, _peak, config(data)) == [2.0, 2.0]


def test_what_no_batch_can_mend_is_not_laid_to_the_batch():
    with pytest.raises(ValueError, match="even number of ranks") as error:
        check_batches(TrainConfig(), ParallelConfig(pp=3, schedule="dualpipe").make_schedule, dp=1)
    assert "train." not in str(error.value)
    with pytest.raises(ValueError, match=r"needs a microbatch .* \(train.global_batch_size=1 makes 1"):
        check_batches(TrainConfig(global_batch_size=1), ParallelConfig(pp=2, schedule="dualpipe").make_schedule, dp=1)


def _changed(rank, world_size, first, then, folder):
    trainer = Trainer(first, World(rank, world_size, torch.device("cpu")))
    at = trainer.save(folder)
    unchanged = trainer.load(at)
    return unchanged, Trainer(then, World(rank, world_size, torch.device("cpu"))).load(at)


def test_going_on_with_other_numbers_is_said(data, tmp_path):
    first, then = config(data, precision="bf16"), config(data, precision="fp8")
    then.optim.moments, then.data.sequence_length = "bf16", 12
    unchanged, changed = run_ranks(1, _changed, first, then, tmp_path)[0]
    assert unchanged == []
    assert changed == ["precision=fp8 (was bf16)", "optim.moments=bf16 (was fp32)", "data.sequence_length=12 (was 24)"]
