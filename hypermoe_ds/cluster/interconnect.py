"""Measure how fast the hosts of a job exchange data.

torchrun starts `python -m hypermoe_ds.cluster.interconnect MEBIBYTES` on all hosts, with one process per rank. Rank 0
prints one line of JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from hypermoe_ds.cluster.preflight import INTERCONNECT, Interconnect
from hypermoe_ds.device import uses_gpu

_TRIALS = 3
_TIMEOUT = timedelta(seconds=30)


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield all pairs from range(count), in rounds of disjoint pairs (round-robin schedule)."""
    seats = list(range(count + count % 2))  # if the count is odd, one number has no partner in each round
    half = len(seats) // 2
    for _ in range(len(seats) - 1):
        opposite = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in opposite if max(pair) < count]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def measure(mebibytes: int, device: torch.device) -> Interconnect:
    """Measure the bandwidth of the default process group. All ranks must call this function.

    Args:
        mebibytes: amount of data that each rank sends, in MiB.
        device: device that holds the data.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers = mebibytes * 2**18 // world * world  # fp32 elements; a multiple of the number of ranks
    size = 4 * numbers / 1e9
    wrong = []

    ones = torch.ones(numbers, device=device)
    seconds = _fastest(lambda: dist.all_reduce(ones.fill_(1)), device)
    if not bool((ones == world).all()):
        wrong.append("all-reduce")
    all_reduce = None if world == 1 else 2 * size * (world - 1) / world / seconds

    sent = torch.arange(world, device=device, dtype=torch.float32).repeat_interleave(numbers // world)
    received = torch.empty_like(sent)
    seconds = _fastest(lambda: dist.all_to_all_single(received, sent), device)
    if not bool((received == rank).all()):
        wrong.append("all-to-all")
    all_to_all = None if world == 1 else size * (world - 1) / world / seconds
    return Interconnect(all_reduce, all_to_all, _pairs(sent, received, size, device), _of_all_ranks(wrong))


def _pairs(
    sent: torch.Tensor, received: torch.Tensor, size: float, device: torch.device
) -> list[tuple[int, int, float]]:
    """Measure the bandwidth between each pair of hosts, whose first ranks send data to each other."""
    host = int(os.environ["GROUP_RANK"])
    first = os.environ["LOCAL_RANK"] == "0"
    leaders = {number: rank for rank, number in enumerate(_of_all_ranks([host if first else None]))}
    found: list[tuple[int, int, float]] = []
    for pairs in rounds(len(leaders.keys() - {None})):
        for pair in pairs:
            if first and host in pair:
                other = leaders[pair[1 - pair.index(host)]]

                def exchange(other: int = other) -> None:
                    sends = dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)
                    for request in dist.batch_isend_irecv(list(sends)):
                        request.wait()

                seconds = _fastest(exchange, device)
                if host == pair[0]:
                    found.append((*pair, size / seconds))
        dist.barrier()
    return sorted(_of_all_ranks(found))


def _fastest(exchange: Callable[[], object], device: torch.device) -> float:
    """Return the time of the fastest trial in seconds. The first exchange opens the connections and is not timed."""
    seconds = []
    for _ in range(1 + _TRIALS):
        start = time.perf_counter()
        exchange()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _of_all_ranks(own: list) -> list:  # type: ignore[type-arg]
    gathered: list[list[object]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return [item for items in gathered for item in items]


def main() -> None:
    """Measure the interconnect and print it on rank 0."""
    on_gpu = uses_gpu()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    interconnect = measure(int(sys.argv[1]), device)
    if dist.get_rank() == 0:
        print(INTERCONNECT + json.dumps(asdict(interconnect)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
