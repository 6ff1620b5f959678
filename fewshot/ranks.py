"""Several processes that share a training: torch.distributed, as torchrun starts it.

    torchrun --nproc-per-node 2 train.py --method lora

N processes, ranks 0 … N-1, run the same program on the same data, one GPU each or the CPU, and
share the work in three ways:

    batches to encode or to test   are dealt out whole (`mine`), and what comes out of them is put
                                   together again (`collect`): each picture is computed once
    a batch to learn from          each rank computes the gradient of a part of it (`share`), and
                                   these are added (`add_gradients`), Σ_r (B_r / B) · ∇ loss_r
    whole runs                     each rank takes some, as a process of its own (`apart`)

What comes out is the same on every rank, to the bit, so that all of them decide alike when to stop
and what to keep. What need not be alike (a clock, free memory, files) is asked of rank 0 (`same`),
and rank 0 alone prints and writes. Without torchrun `size` is 1, and whoever asks that first passes
by all that is here.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from clip_min import UserError

WAIT = timedelta(days=1)  # for one another: rank 0 may download, or make images, for hours
size, rank = 1, 0  # N, the processes that share the work now, and which of them this is


def by_first(work: Callable[..., None]) -> Callable[..., None]:
    """A decorator: what rank 0 alone does."""

    @functools.wraps(work)
    def done(*arguments, **named) -> None:
        if rank == 0:
            work(*arguments, **named)

    return done


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """While open, this process works with the others that torchrun started, if it started any.

    What ranks other than 0 print is dropped, but not what they raise.
    """
    global size, rank
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    check_environment()
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local % gpus)  # what "cuda" means from now on
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=WAIT)
    size, rank = dist.get_world_size(), dist.get_rank()
    with contextlib.ExitStack() as stack:
        if rank:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
        wait()  # a rank that is done, and ended, would break off what others still ask it for
    size, rank = 1, 0
    dist.destroy_process_group()


def check_environment() -> None:
    """UserError, if not all is there that torchrun tells the processes it starts."""
    count = os.environ["WORLD_SIZE"]
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        told = os.environ.get(name, "")
        if not told or (name != "MASTER_ADDR" and not told.isdecimal()):
            raise UserError(
                f"WORLD_SIZE is {count!r} in the environment, as where torchrun starts processes, "
                f"but {name} is {told!r}; start with torchrun, or unset WORLD_SIZE"
            )


def check_device(device: str) -> None:
    """UserError, if several processes cannot each compute on `device`."""
    if device == "cpu":
        return
    if device != "cuda":
        raise UserError(
            f"--device {device}: each process takes a GPU of its own; give cuda, or cpu"
        )
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if local > gpus:
        raise UserError(
            f"--nproc-per-node {local}: each process needs a GPU, and this machine has {gpus}; "
            "start as many, or give --device cpu"
        )


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """While open, every process is alone (N is 1): does all it is told to, prints, and writes."""
    global size, rank
    together, size, rank = (size, rank), 1, 0
    try:
        yield
    finally:
        size, rank = together


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Rank 0 does what is inside alone, and then the others: they find the files it left."""
    if rank:
        wait()
    with apart():
        yield
    if rank == 0:
        wait()


def wait() -> None:
    """Until all ranks are here."""
    if size > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, where `WAIT` holds


def same(value):
    """Rank 0's `value`, on all ranks."""
    return together(value)[0]


def together(value) -> list:
    """The values of all ranks, in their order; they are copied, and so should be small."""
    if size == 1:
        return [value]
    found = [None] * size
    dist.all_gather_object(found, value)
    return found


# ------------------------------------------------------------------------ encoding and testing


def mine(parts: Sequence) -> Sequence:
    """The parts of the work that are this rank's: every N-th."""
    return parts[rank::size]


def collect(parts: Sequence[Tensor], rows: Iterable[Tensor]) -> Tensor:
    """Rows (B, …) of each of `mine(parts)`, as they come -> those of all parts, in their places.

    parts: numbers (B,) of rows, each of which is in one of them.
    """
    found, count = None, sum(map(len, parts))
    for part, x in zip(mine(parts), rows, strict=True):
        if found is None:
            found = x.new_zeros(count, *x.shape[1:])
        found[part] = x
    if size == 1:
        return found
    like = same(None if found is None else (found.shape, found.dtype, found.device.type))
    if found is None:  # there are fewer parts than ranks
        found = torch.zeros(like[0], dtype=like[1], device=like[2])
    fill(found)
    return found


def fill(rows: Tensor) -> None:
    """Of each row one rank has the content, and the others zeros: give it to all of them."""
    if size > 1:
        dist.all_reduce(rows.view(-1).view(torch.uint8))  # of bytes, so that sums are exact


# ------------------------------------------------------------------------------------ learning


def share(batch: Tensor) -> tuple[Tensor, int, float]:
    """A batch (B,) -> this rank's part of it (B_r,), where in the batch it begins, and B_r / B.

    A rank for which nothing is left takes the first picture, which then weighs 0.
    """
    begin, end = (len(batch) * r // size for r in (rank, rank + 1))
    if begin == end:
        return batch[:1], 0, 0.0
    return batch[begin:end], begin, (end - begin) / len(batch)


def add_gradients(tensors: list[Tensor]) -> None:
    """Add up, over the ranks, the gradient of each tensor; in one message."""
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def total(value: Tensor) -> Tensor:
    """The sum of the ranks' values."""
    value = value.clone()
    dist.all_reduce(value)
    return value


def agree(tensors: Iterable[Tensor]) -> None:
    """Give every rank the tensors of rank 0: equal computations may differ in last bits on GPUs."""
    for tensor in tensors:
        whole = tensor.data.contiguous()  # which NCCL asks for
        dist.broadcast(whole, 0)
        tensor.data.copy_(whole)


# --------------------------------------------------------------------------------- random numbers


def part_ways(seed: int) -> None:
    """Give the ranks other than 0 random numbers of their own: other dropout, other crops."""
    if rank:
        torch.manual_seed((1_000_003 * seed + 7919 * rank) % 2**63)
