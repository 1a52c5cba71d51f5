"""The memory that passes of a network need, counted tensor by tensor.

Counted, not read off the process: its resident memory depends on what its allocator has kept from before. What an operator
takes for itself (a convolution's workspace) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes of the tensors that `work` makes, at the moment when it holds most. What was there before is not counted."""
    watching = _Watching()
    with watching:
        work()
    return watching.peak


class _Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.held: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        given = _storages((args, kwargs))  # what an operator works on in place, or gives a view of, is no new memory
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        self.held |= {storage: size for storage, size in _storages(made).items() if storage not in given}
        self.peak = max(self.peak, sum(self.held.values()))
        return made


def _storages(values: Any) -> dict[StorageWeakRef, int]:
    storages = (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


def kept_for_backward(work: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from the forward pass in `work` for its backward pass.

    Every storage counts whole and once, however many views of it are kept. Those of `own`, such as the parameters, do not
    count: they are there without the pass. What is computed from them and kept does. Gradients, and what the forward pass
    frees again, are no part of it.
    """
    before = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        made = work()
    del made  # which held what was kept until now
    return sum(kept.values())
