"""Each back end takes the steps of one process on the same global batch, synchronising parameters once per step."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lookalike.collectives import broadcast_from_first, gather_on_first
from lookalike.encoder import Encoder
from lookalike.encoder_settings import EncoderSettings
from lookalike.errors import SettingsError
from lookalike.world import World
from tests.gloo_ranks import run_on_ranks
from training.backend_settings import BackendSettings
from training.backends.protocol import Backend, create_backend
from training.large_batch import backward_large_batch
from training.optimizer import create_optimizer, freeze_parameters, set_learning_rate
from training.optimizer_settings import AdamWSettings, SGDSettings

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (extra [deepspeed])"
)
BACKENDS = {
    "single": {"name": "single"},
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2", "smallest_unit": 500},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
    "zero3_all_spread": {"name": "deepspeed", "zero_stage": 3, "largest_whole_parameter": 0},
}
NUM_RANKS, NUM_IMAGES, CHUNK_SIZE, NUM_CHUNKS = 2, 16, 2, 4
# (optimizer, precision, chunks whose graph is kept)
CASES = [
    ("sgd", "float32", 0),
    ("adamw", "float32", 0),
    ("adamw", "float32", 1),
    ("adamw", "float32", NUM_CHUNKS),
    ("sgd", "bfloat16", 1),
    ("adamw", "bfloat16", 0),
]
OPTIMIZERS = {
    "adamw": AdamWSettings(lr=1e-3, weight_decay=0.1, projection_lr_multiplier=3),
    "sgd": SGDSettings(name="sgd", lr=0.1, weight_decay=1e-3),
}
# In DeepSpeed's encoder the pooling's power is a vector of one, with which torch rounds later in bfloat16: one bit.
BFLOAT16_BIT = 2**-8
# Relative difference of each parameter after three steps. The gradients' last bits differ by the order of summation;
# AdamW divides by their size, so that small gradients' bits weigh as much as large ones'. Under bfloat16 each process
# rounds its own part of a sum once more, and for a parameter of one element, the power of the pooling, nothing averages
# that out: 8e-4 and 3.5e-3 were seen, up to one bit of bfloat16.
BOUNDS = {
    ("sgd", "float32"): 1e-6,
    ("adamw", "float32"): 1e-5,
    ("sgd", "bfloat16"): BFLOAT16_BIT,
    ("adamw", "bfloat16"): 5e-3,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, features: Tensor) -> Tensor:
        return features + nn.functional.gelu(self.norm(self.convolution(features)))


def small_encoder() -> Encoder:
    """What back ends treat differently: nested blocks, a number as parameter, buffers, channels last, a frozen part."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Sequential(Block(), Block()), nn.GELU())
    settings = EncoderSettings(backbone="small", pooling="gem", projection_dim=12)
    encoder = Encoder(settings, backbone, num_features=8).to(memory_format=torch.channels_last)
    freeze_parameters(encoder, ("backbone.0.bias",))
    return encoder.train()


@dataclass
class Steps:
    """What a back end did."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)  # of the first step
    norms: list[float] = field(default_factory=list)
    reduced: list[int] = field(default_factory=list)  # elements in reductions, by step


def new_backend(world: World, tree: dict[str, Any], optimizer: str, max_norm: float | None = 0.05) -> Backend:
    settings: Any = TypeAdapter(BackendSettings).validate_python(tree)
    return create_backend(
        settings,
        small_encoder(),
        lambda encoder: create_optimizer(encoder, OPTIMIZERS[optimizer]),
        max_gradient_norm=max_norm,
        world=world,
    )


def take_step(
    backend: Backend, world: World, step: int, *, kept: int = 0, autocast: torch.dtype | None = None, factor: float = 1
) -> None:
    """A loss whose gradient depends on the embeddings, on this rank's share of the batch."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (NUM_IMAGES, 3, 16, 16), dtype=torch.uint8, generator=generator)
    targets = torch.randn(NUM_IMAGES, 12, generator=generator)
    size = NUM_IMAGES // world.size
    own = slice(world.rank * size, (world.rank + 1) * size)

    def score(embeddings: Tensor) -> tuple[Tensor, Tensor]:
        difference = embeddings - targets[own]
        return (difference**2).sum() / NUM_IMAGES, factor * 2 * difference / NUM_IMAGES

    for module in backend.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    set_learning_rate(backend.optimizer, 1 / (1 + step))
    backend.begin_step(num_chunks=size // CHUNK_SIZE, num_kept_chunks=kept)
    backward_large_batch(
        backend.network,
        pixels[own],
        score,
        chunk_size=CHUNK_SIZE,
        num_kept_chunks=kept,
        seed=0,
        autocast=autocast,
        backward_chunk=backend.backward_chunk,
    )


def take_steps(
    world: World, tree: dict[str, Any], optimizer: str, precision: str, kept: int, sizes: list[int]
) -> Steps:
    """
    Args:
        sizes: See `counted_reductions`.
    """
    backend, steps = new_backend(world, tree, optimizer), Steps()
    autocast = torch.bfloat16 if precision == "bfloat16" else None
    for step in range(3):
        sizes.clear()
        take_step(backend, world, step, kept=kept, autocast=autocast)
        steps.reduced.append(sum(sizes))
        if step == 0:
            steps.gradients = {name: value.clone().numpy() for name, value in backend.full_gradients().items()}
        steps.norms.append(float(backend.step()))
    steps.weights = {name: value.numpy() for name, value in backend.full_weights().items()}
    return steps


@contextmanager
def counted_reductions() -> Iterator[list[int]]:
    """Elements in each reduction of more than a few; begun before a back end is built, which may keep functions."""
    sizes: list[int] = []
    originals: dict[str, Callable[..., Any]] = {}

    def counting(original: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            tensor = arguments[position] if len(arguments) > position else options.get("input", options.get("tensor"))
            if tensor.numel() > 8:
                sizes.append(tensor.numel())
            return original(*arguments, **options)

        return call

    positions = {"all_reduce": 0, "reduce": 0, "reduce_scatter_tensor": 1, "reduce_scatter_single": 1}
    for name, position in positions.items():
        if hasattr(torch.distributed, name):
            originals[name] = getattr(torch.distributed, name)
            setattr(torch.distributed, name, counting(originals[name], position))
    try:
        yield sizes
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)


def run_everything(world: World, name: str, folder: Path) -> dict[str, Any]:
    """All that the tests below look at, in one world: joining processes costs more than stepping."""
    tree = BACKENDS[name]
    # Where DeepSpeed would put what it compiles.
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "compiled")
    with counted_reductions() as sizes:
        steps = {case: take_steps(world, tree, *case, sizes=sizes) for case in CASES}
    return {
        "steps": steps,
        "resumed": {optimizer: resumed_weights(world, tree, optimizer, folder) for optimizer in OPTIMIZERS},
        "exported": exported(world, tree, folder),
        "not finite": weights_around_a_bad_step(world, tree),
        "refusals": refusals(world, tree),
    }


def resumed_weights(world: World, tree: dict[str, Any], optimizer: str, folder: Path) -> list[dict[str, np.ndarray]]:
    """After three steps: in one go, and by a second back end that goes on from what the first one saved after two."""
    backend = new_backend(world, tree, optimizer)
    results = []
    for step in range(3):
        if step == 2:
            stored = {"weights": backend.full_weights(), "optimizer": backend.optimizer_state()}
            if world.is_first:
                torch.save(stored, folder / f"{optimizer}.pt")
            torch.distributed.barrier() if world.size > 1 else None
        take_step(backend, world, step)
        backend.step()
    results.append(backend.full_weights())
    second = new_backend(world, tree, optimizer)
    take_step(second, world, 7)  # other weights and moments, all of which must go
    second.step()
    stored = torch.load(folder / f"{optimizer}.pt", weights_only=True)
    second.load(stored["weights"], stored["optimizer"])
    take_step(second, world, 2)
    second.step()
    results.append(second.full_weights())
    return [{name: value.numpy() for name, value in weights.items()} for weights in results]


def exported(world: World, tree: dict[str, Any], folder: Path) -> list[np.ndarray]:
    """Embeddings by the back end's network, and by a plain encoder with the weights it wrote as safetensors."""
    backend = new_backend(world, tree, "sgd")
    take_step(backend, world, 0)
    backend.step()
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = backend.network.eval()(pixels)
    weights = backend.full_weights()
    if not world.is_first:
        return []
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "weights.safetensors")
    plain = small_encoder().eval()
    before = plain(pixels)
    plain.load_state_dict(load_file(folder / "weights.safetensors"))
    return [value.detach().numpy() for value in (own, plain(pixels), before)]


def weights_around_a_bad_step(world: World, tree: dict[str, Any]) -> tuple[float, list[dict[str, np.ndarray]]]:
    backend = new_backend(world, tree, "adamw")
    before = {name: value.numpy() for name, value in backend.full_weights().items()}
    take_step(backend, world, 0, factor=float("nan") if world.rank == world.size - 1 else 1)
    norm = float(backend.step())
    return norm, [before, {name: value.numpy() for name, value in backend.full_weights().items()}]


def refusals(world: World, tree: dict[str, Any]) -> list[str]:
    """What is said to ranks with different numbers of chunks, where that would hang."""
    if tree["name"] in ("single", "ddp"):
        return []
    backend = new_backend(world, tree, "sgd")
    with pytest.raises(SettingsError) as caught:
        backend.begin_step(num_chunks=2 + world.rank, num_kept_chunks=0)
    return [str(caught.value)]


@pytest.fixture(scope="module")
def reference() -> dict[tuple[str, str], Steps]:
    """One process, one optimizer step on the whole batch: the plain path."""
    return {case: take_steps(World(), BACKENDS["single"], *case, 0, []) for case in BOUNDS}


@dataclass
class Run:
    name: str
    folder: Path
    ranks: list[dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=needs_deepspeed if "zero" in name else ()) for name in BACKENDS],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    return Run(request.param, folder, run_on_ranks(run_everything, NUM_RANKS, request.param, folder))


def relative(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    assert list(found) == list(wanted)
    return {
        name: float(np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name]))
        for name in wanted
        if np.linalg.norm(wanted[name]) > 0
    }


def test_weights_after_three_steps_are_those_of_one_process(run: Run, reference: dict[Any, Steps]) -> None:
    for (optimizer, precision, kept), steps in run.ranks[0]["steps"].items():
        wanted = reference[optimizer, precision]
        differences = relative(steps.weights, wanted.weights)
        bound = BOUNDS[optimizer, precision]
        assert max(differences.values()) <= bound, (optimizer, precision, kept, differences)
        moved = relative(new_weights(), wanted.weights)
        assert max(moved.values()) > 20 * bound  # the steps are larger than what is forgiven


def new_weights() -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in small_encoder().state_dict().items()}


def test_gradients_and_their_norm_are_those_of_one_process(run: Run, reference: dict[Any, Steps]) -> None:
    for rank in run.ranks:
        for (optimizer, precision, kept), steps in rank["steps"].items():
            wanted = reference[optimizer, precision]
            bound = 2e-6 if precision == "float32" else 1e-2
            differences = relative(steps.gradients, wanted.gradients)
            assert max(differences.values()) <= bound, (optimizer, precision, kept, differences)
            np.testing.assert_allclose(steps.norms, wanted.norms, rtol=bound)


def test_parameters_are_synchronised_once_per_step(run: Run) -> None:
    num_trained = sum(p.numel() for p in small_encoder().parameters() if p.requires_grad)
    for case, steps in run.ranks[0]["steps"].items():
        for reduced in steps.reduced:
            # Padding to equal shares adds a little; a second reduction would double it.
            assert 0.95 * num_trained <= reduced <= 1.3 * num_trained, case


def test_resuming_gives_the_same_bits(run: Run) -> None:
    for straight, resumed in run.ranks[0]["resumed"].values():
        assert list(straight) == list(small_encoder().state_dict())
        for name, value in straight.items():
            np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def test_exported_weights_embed_in_a_plain_encoder(run: Run) -> None:
    own, plain, before = run.ranks[0]["exported"]
    np.testing.assert_allclose(plain, own, atol=1e-6)
    assert np.abs(plain - before).max() > 1e-3


def test_a_gradient_that_is_not_finite_moves_nothing_on_any_rank(run: Run) -> None:
    for rank in run.ranks:
        norm, _ = rank["not finite"]
        assert not np.isfinite(norm)
    _, (before, after) = run.ranks[0]["not finite"]
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_nothing_is_compiled(run: Run) -> None:
    assert not (run.folder / "compiled").exists()


def test_different_numbers_of_chunks_are_refused_on_every_rank(run: Run) -> None:
    if run.name in ("single", "ddp"):
        pytest.skip("no pass but the last one is collective")
    for rank in run.ranks:
        [message] = rank["refusals"]
        assert "(2, 0), (3, 0)" in message


def load_alone(name: str, folder: Path) -> dict[str, np.ndarray]:
    stored = torch.load(folder / "adamw.pt", weights_only=True)
    backend = new_backend(World(), BACKENDS["single"], "adamw")
    backend.load(stored["weights"], stored["optimizer"])
    take_step(backend, World(), 2)
    backend.step()
    return {name: value.numpy() for name, value in backend.full_weights().items()}


def test_one_process_goes_on_from_what_two_saved_or_says_why_not(run: Run) -> None:
    if "zero" in run.name:
        with pytest.raises(SettingsError, match=r"spread by deepspeed \(ZeRO \d\).*start a new run"):
            load_alone(run.name, run.folder)
        return
    straight, _ = run.ranks[0]["resumed"]["adamw"]
    assert max(relative(load_alone(run.name, run.folder), straight).values()) <= BOUNDS["adamw", "float32"]


def small_collectives(world: World) -> tuple[list[float], list[dict[str, int]]]:
    row = torch.tensor([float(world.rank), 5.0])
    return broadcast_from_first(row + 1, world).tolist(), gather_on_first({"rank": world.rank}, world)


def test_the_first_rank_tells_all_and_hears_all() -> None:
    assert run_on_ranks(small_collectives, 2) == [([1.0, 6.0], [{"rank": 0}, {"rank": 1}]), ([1.0, 6.0], [])]
    assert small_collectives(World()) == ([1.0, 6.0], [{"rank": 0}])
