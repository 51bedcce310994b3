"""The only file that calls torch.distributed collectives. In a world of one every function is the identity."""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as distributed
from jaxtyping import Float, Shaped
from torch import Tensor

from lookalike.launch import may_hang_after_restart
from lookalike.world import World

logger = logging.getLogger(__name__)


@contextmanager
def process_group(world: World) -> Iterator[None]:
    """Joins the world's processes for the length of the block: NCCL where each has a GPU, gloo elsewhere."""
    if world.size == 1:
        yield
        return
    if world.is_first and may_hang_after_restart(os.environ):
        logger.warning(
            "processes that this torchrun starts again may hang. Start it with `lookalike launch`, and with "
            "--rdzv-backend c10d or --standalone in place of --node-rank and --master-addr."
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
        distributed.init_process_group("nccl", device_id=torch.device("cuda", world.local_rank))
    else:
        distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def all_gather_rows(rows: Shaped[Tensor, "rows *rest"], world: World) -> Shaped[Tensor, "all_rows *rest"]:
    """Rows of all ranks in rank order; every rank must bring the same number. Carries no gradient."""
    if world.size == 1:
        return rows
    gathered = rows.new_empty((world.size * rows.shape[0], *rows.shape[1:]))
    with _newer_names_ignored():
        distributed.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def reduce_scatter_rows(all_rows: Float[Tensor, "all_rows dim"], world: World) -> Float[Tensor, "rows dim"]:
    """Sums `all_rows` over ranks and returns this rank's part of the rows."""
    if world.size == 1:
        return all_rows
    own = all_rows.new_empty((all_rows.shape[0] // world.size, *all_rows.shape[1:]))
    with _newer_names_ignored():
        distributed.reduce_scatter_tensor(own, all_rows.contiguous())
    return own


def sum_over_ranks(tensors: Iterable[Tensor], world: World) -> None:
    """Sums each tensor over ranks in place, all of them in one message per data type."""
    if world.size == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for group in by_type.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        distributed.all_reduce(flat)
        for tensor, summed in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(summed.view_as(tensor))


# torch checks that a hook has these very annotations; mypy does not see where it exports the first of them.
def sum_bucket_over_ranks(
    state: object,
    bucket: distributed.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Communication hook of DistributedDataParallel that sums where the library would average."""
    work = distributed.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def broadcast_from_first(tensor: Shaped[Tensor, "*shape"], world: World) -> Shaped[Tensor, "*shape"]:
    """The first rank's tensor, on every rank; others bring one of the same shape and type, which is overwritten."""
    if world.size > 1:
        distributed.broadcast(tensor, src=0)
    return tensor


def gather_on_first(value: Any, world: World) -> list[Any]:
    """Each rank's value, which must pickle, in rank order on the first rank; empty elsewhere. Tensors: on the CPU."""
    if world.size == 1:
        return [value]
    gathered = [None] * world.size if world.is_first else None
    distributed.gather_object(value, gathered, dst=0)
    return gathered or []


def any_rank(flag: bool, world: World, *, device: torch.device) -> bool:
    """True on every rank if `flag` is true on at least one."""
    if world.size == 1:
        return flag
    votes = torch.tensor([float(flag)], device=device)
    distributed.all_reduce(votes)
    return bool(votes.item() > 0)


@contextmanager
def _newer_names_ignored() -> Iterator[None]:
    """torch 2.13 warns that these two have new names, which the older versions that we support lack."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def barrier(world: World) -> None:
    if world.size > 1:
        distributed.barrier()
