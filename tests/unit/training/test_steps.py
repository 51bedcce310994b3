"""One step: what is computed how, and when weights do not move."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipelines.shard_set import ShardSet
from lookalike.encoder import load_encoder
from lookalike.errors import NonFiniteLoss, ResourceError, SettingsError
from lookalike.world import World
from tests.unit.training.small_runs import CLASSES, settings_for
from training.loop import take_step, train
from training.losses.batch_loss import BatchLoss, LossShare
from training.run_length import plan_batches
from training.settings import TrainSettings
from training.training_state import begin_or_resume


class LossWithoutValue(BatchLoss):
    def forward(self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int) -> LossShare:
        return LossShare(embeddings.sum() * torch.nan, embeddings * torch.nan)


class LossWithInfiniteGradient(BatchLoss):
    def forward(self, embeddings: Tensor, labels: Tensor, *, share: tuple[int, int], step: int) -> LossShare:
        return LossShare(embeddings.sum(), embeddings * torch.inf)


@pytest.mark.parametrize(
    ("loss", "told"),
    [(LossWithoutValue(), "step 5: loss nan"), (LossWithInfiniteGradient(), r"step 5: loss .*, gradient norm nan")],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_before_weights_move(
    shards_folder: Path, tmp_path: Path, loss: BatchLoss, told: str
) -> None:
    settings = settings_for(shards_folder, tmp_path / "run")
    state = begin_or_resume(settings, None, classes=CLASSES)
    before = {name: value.clone() for name, value in state.encoder.state_dict().items()}
    state.loss = loss
    pixels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(NonFiniteLoss, match=told):
        take_step(state, pixels, torch.arange(8) // 2, settings, step=5, world=World())
    for name, value in state.encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_freezing_everything_is_refused(tmp_path: Path) -> None:
    encoder = {"backbone": "resnet10t", "input": {"size": 32}}
    settings = settings_for(tmp_path, tmp_path, encoder=encoder, frozen=["backbone."])
    with pytest.raises(SettingsError, match="no parameter is left"):
        begin_or_resume(settings, None, classes=CLASSES)


def gradients_of_first_step(settings: TrainSettings) -> list[Tensor]:
    state = begin_or_resume(settings, None, classes=CLASSES)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    take_step(state, pixels, torch.arange(8) // 2, settings, step=0, world=World())
    return [parameter.grad for parameter in state.encoder.parameters() if parameter.grad is not None]


def test_recomputed_activations_change_no_gradient_and_bfloat16_changes_it_little(tmp_path: Path) -> None:
    loss = {"rank_temperature": 0.1, "k_temperature": 4.0}
    plain = gradients_of_first_step(settings_for(tmp_path, tmp_path / "a", loss=loss))
    cases: list[tuple[dict[str, object], float]] = [
        ({"recomputes_activations": True}, 1e-6),
        ({"precision": "bfloat16"}, 0.3),
    ]
    for compute, tolerance in cases:
        changed = gradients_of_first_step(settings_for(tmp_path, tmp_path / "a", loss=loss, compute=compute))
        difference = torch.cat([(one - other).flatten() for one, other in zip(changed, plain, strict=True)]).norm()
        assert all(gradient.dtype == torch.float32 for gradient in changed)
        assert float(difference) <= tolerance * float(torch.cat([gradient.flatten() for gradient in plain]).norm())
        assert (float(difference) > 0) == ("precision" in compute)


def test_a_backbone_that_cannot_recompute_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(
        tmp_path,
        tmp_path / "run",
        encoder={"backbone": "resnet10t", "input": {"size": 32}},
        compute={"recomputes_activations": True},
    )

    def refuse(model: object, enable: bool = True) -> None:
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr("timm.models.resnet.ResNet.set_grad_checkpointing", refuse)
    with pytest.raises(SettingsError, match=r"compute\.recomputes_activations: backbone resnet10t"):
        begin_or_resume(settings, None, classes=CLASSES)


def test_trained_batch_norms_move_their_statistics_and_need_the_chunks_of_one_process(
    shards_folder: Path, tmp_path: Path
) -> None:
    batch = {"classes_per_batch": 4, "images_per_class": 2, "chunk_size": 8}
    settings = settings_for(shards_folder, tmp_path / "run", batch_norm="trained", batch=batch)
    folder = train(settings)
    start = begin_or_resume(settings_for(shards_folder, tmp_path / "new"), None, classes=CLASSES).encoder
    trained = load_encoder(folder).state_dict()
    statistics = {name: value for name, value in start.named_buffers() if "running" in name}
    assert statistics
    assert not any(torch.equal(value, trained[name]) for name, value in statistics.items())
    with ShardSet.open(shards_folder) as shard_set, pytest.raises(SettingsError, match="2 processes must have"):
        plan_batches(settings, shard_set, World(0, 2))


def test_chunks_are_measured_where_the_settings_leave_them_to_the_machine(shards_folder: Path, tmp_path: Path) -> None:
    batch = {"classes_per_batch": 4, "images_per_class": 2, "chunk_size": 4, "num_kept_chunks": "auto"}
    settings = settings_for(shards_folder, tmp_path, batch=batch)
    state = begin_or_resume(settings, None, classes=CLASSES)
    assert (state.passes.chunk_size, state.passes.num_kept_chunks) == (4, 2), "two chunks of a few MB fit anywhere"
    tight = settings_for(shards_folder, tmp_path, batch={**batch, "memory_budget": 1000})
    with pytest.raises(ResourceError, match=r"Raise batch\.memory_budget"):
        begin_or_resume(tight, None, classes=CLASSES)


@pytest.mark.slow
# torch's compiler defines a script method when it is loaded.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning")
def test_a_compiled_backbone_gives_the_gradient_of_a_plain_one(tmp_path: Path) -> None:
    loss = {"rank_temperature": 0.1, "k_temperature": 4.0}
    plain = gradients_of_first_step(settings_for(tmp_path, tmp_path / "a", loss=loss))
    compiled = gradients_of_first_step(
        settings_for(tmp_path, tmp_path / "a", loss=loss, compute={"compiles_backbone": True})
    )
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
