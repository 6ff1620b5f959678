"""Several processes that share a training: torch.distributed, as torchrun starts it.

    torchrun --nproc-per-node 2 train.py --method lora

N processes, ranks 0 … N-1, run the same program on the same data, each with its own GPU or on the
CPU. They share the work in three ways:

    batches to encode or to test   are distributed (`mine`), and the results are collected
                                   (`collect`): each picture is computed once
    a batch to learn from          each rank computes the gradient of its part (`share`), and the
                                   gradients are added (`add_gradients`), Σ_r (B_r / B) · ∇ loss_r
    whole runs                     each rank takes some, as a separate process (`apart`)

Results are equal on all ranks, to the bit, so that all ranks make the same decisions. Values that
may differ (a clock, free memory, files) come from rank 0 (`same`), and only rank 0 prints and
writes. Without torchrun `size` is 1, and callers that check it skip everything here.
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

WAIT = timedelta(days=30)  # for each other: one may download, make images, or train whole runs
# What `wait` sends. It is never freed: gloo frees the last tensor in a thread of its own, and (seen
# with torch 2.6) may then wait for Python forever, which waits for that thread to end.
SIGNAL = torch.zeros(1)
size, rank = 1, 0  # the number of processes that share the work, and this one's number


def by_first(work: Callable[..., None]) -> Callable[..., None]:
    """A decorator: only rank 0 calls the function."""

    @functools.wraps(work)
    def done(*arguments, **named) -> None:
        if rank == 0:
            work(*arguments, **named)

    return done


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """A context in which this process works with the others that torchrun started, if any.

    Output of ranks other than 0 is dropped, but not their errors.
    """
    global size, rank
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    check_environment()
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local % gpus)  # "cuda" means this GPU from now on
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=WAIT)
    size, rank = dist.get_world_size(), dist.get_rank()
    with contextlib.ExitStack() as stack:
        if rank:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
        wait()  # a rank that has ended would break requests of the others
    size, rank = 1, 0
    dist.destroy_process_group()


def check_environment() -> None:
    """UserError, if variables that torchrun sets are missing or wrong."""
    count = os.environ["WORLD_SIZE"]
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        told = os.environ.get(name, "")
        if not told or (name != "MASTER_ADDR" and not told.isdecimal()):
            raise UserError(
                f"WORLD_SIZE is {count!r} in the environment, as set by torchrun, but {name} is "
                f"{told!r}; start with torchrun, or unset WORLD_SIZE"
            )


def check_device(device: str) -> None:
    """UserError, if several processes cannot each compute on `device`."""
    if device == "cpu":
        return
    if device != "cuda":
        raise UserError(f"--device {device}: each process uses a GPU of its own; give cuda, or cpu")
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if local > gpus:
        raise UserError(
            f"--nproc-per-node {local}: each process needs a GPU, and this machine has {gpus}; "
            "start as many, or give --device cpu"
        )


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """A context in which each process works alone (N is 1), prints and writes."""
    global size, rank
    together, size, rank = (size, rank), 1, 0
    try:
        yield
    finally:
        size, rank = together


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """A context that rank 0 runs first, and then the others, which find its files."""
    if rank:
        wait()
    with apart():
        yield
    if rank == 0:
        wait()


def wait() -> None:
    """Wait until all ranks are here."""
    if size > 1:
        dist.all_reduce(SIGNAL)  # on the CPU, where the timeout is `WAIT`


def same(value):
    """Rank 0's `value`, on all ranks."""
    return together(value)[0]


def together(value) -> list:
    """The values of all ranks in order; they are copied, so they should be small."""
    if size == 1:
        return [value]
    found = [None] * size
    dist.all_gather_object(found, value)
    return found


# ------------------------------------------------------------------------ encoding and testing


def mine(parts: Sequence) -> Sequence:
    """This rank's parts of the work: every N-th."""
    return parts[rank::size]


def collect(parts: Sequence[Tensor], rows: Iterable[Tensor]) -> Tensor:
    """Rows (B, …) for each of `mine(parts)` -> the rows of all parts, in their places.

    parts: indices (B,) of rows; each row is in one part.
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
    """Give all ranks the rows, of which one rank has the content and the others zeros."""
    if size > 1:
        dist.all_reduce(rows.view(-1).view(torch.uint8))  # sums of bytes are exact


# ------------------------------------------------------------------------------------ learning


def share(batch: Tensor) -> tuple[Tensor, int, float]:
    """A batch (B,) -> this rank's part (B_r,), its first place in the batch, and B_r / B.

    A rank without a part takes the first picture with weight 0.
    """
    begin, end = (len(batch) * r // size for r in (rank, rank + 1))
    if begin == end:
        return batch[:1], 0, 0.0
    return batch[begin:end], begin, (end - begin) / len(batch)


def add_gradients(tensors: list[Tensor]) -> None:
    """Add the gradients of each tensor over the ranks, in one message."""
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
    """Copy rank 0's tensors to all ranks: on GPUs equal computations may differ in last bits."""
    for tensor in tensors:
        whole = tensor.data.contiguous()  # required by NCCL
        dist.broadcast(whole, 0)
        tensor.data.copy_(whole)


# --------------------------------------------------------------------------------- random numbers


def part_ways(seed: int) -> None:
    """Give each rank other than 0 its own random numbers, for dropout and crops."""
    if rank:
        torch.manual_seed((1_000_003 * seed + 7919 * rank) % 2**63)
