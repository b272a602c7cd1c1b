"""What autograd keeps for the backward pass, counted byte by byte."""

from collections import Counter
from contextlib import contextmanager

import torch


class _Kept:
    """Holds one saved tensor and tells when it is let go."""

    def __init__(self, tensor: torch.Tensor, counts: Counter, memory: dict[str, int], weights: set[int]):
        self.tensor, self.counts, self.memory = tensor, counts, memory
        storage = tensor.untyped_storage()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        self.counted = self.key not in weights
        if self.counted:
            if not counts[self.key]:
                memory["now"] += self.size
                memory["peak"] = max(memory["peak"], memory["now"])
            counts[self.key] += 1

    def __del__(self):
        if self.counted:
            self.counts[self.key] -= 1
            if not self.counts[self.key]:
                self.memory["now"] -= self.size


@contextmanager
def saved_memory(model: torch.nn.Module):
    """Yields {"now", "peak"}: bytes of activations that autograd holds; a storage counts once, weights do not."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    memory, counts = {"now": 0, "peak": 0}, Counter()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _Kept(tensor, counts, memory, weights), lambda kept: kept.tensor
    ):
        yield memory
