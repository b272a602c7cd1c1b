"""One index by several processes, of torchrun or `accelerate launch`: each encodes its part, the first one writes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from typing import TypeVar

from ..hub.machine import processes_now


Video = TypeVar("Video")

ROUND = 4  # videos of each process from one meeting to the next
PATIENCE = timedelta(days=1)  # a film may take one process hours longer than the others


def encode_together(
    paths: Sequence[str] | None, encode: Callable[[Sequence[str]], Iterable[Video]]
) -> Iterator[Video]:
    """What `encode` gives of `paths`, one video for each: to the first process all of them, to the others none.

    Every process calls it and goes over it to the end; the `paths` of the first one count. If one of them ends, its
    launcher ends all, and the same command goes on with what the table lacks.
    """
    rank, processes, _ = processes_now()
    if processes == 1:
        yield from encode(paths)
        return
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=PATIENCE)  # what travels are paths and features on the CPU
    told = [paths]
    dist.broadcast_object_list(told, src=0, group=group)
    mine = iter(encode(told[0][rank::processes]))
    for _ in range(math.ceil(math.ceil(len(told[0]) / processes) / ROUND)):
        parts = [None] * processes if rank == 0 else None
        dist.gather_object(list(islice(mine, ROUND)), parts, dst=0, group=group)
        for part in parts or ():
            yield from part
