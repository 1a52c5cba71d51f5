"""Batch normalization that is fixed, as in the detectors of Appendix A: an affine map, and nothing in it trains.

The paper recomputes the statistics over the pre-training set and then fixes them, "mainly for reducing memory
consumption". The first half is `rp.precise_batch_norm`; a finished run holds such statistics already, unless its recipe
says otherwise. The second half is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import resprobe as rp


class FrozenBatchNorm2d(nn.Module):
    """The affine map that a `BatchNorm2d` is in evaluation mode, in either mode.

    Statistics, weight and bias are buffers under the names that `BatchNorm2d` uses, so its state dict loads. Nothing of
    the input is kept for the backward pass.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    @classmethod
    def of(cls, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> FrozenBatchNorm2d:
        """A frozen copy of `norm`. Raises `rp.UsageError` if it has no statistics to freeze."""
        if norm.running_mean is None:
            raise rp.UsageError(
                "bn (='frozen') needs batch normalization with running statistics; this network's layers have "
                "track_running_stats (=False); accepted with them: bn='trained'"
            )
        frozen = cls(norm.num_features, norm.eps).to(norm.running_mean)
        frozen.load_state_dict(norm.state_dict(), strict=norm.affine)  # without an affine part: weight 1, bias 0
        return frozen.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # In the precision of the input, or autocast would carry all that follows to float32.
        return torch.addcmul(shift.to(x.dtype).view(-1, 1, 1), x, scale.to(x.dtype).view(-1, 1, 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # which a fixed layer does not count
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


_PLAIN = {nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward}


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every batch normalization inside `module`, in place, and returns it (or what replaces `module` itself).

    Other normalizations are left alone. A layer that stands in several places remains one layer. Raises `rp.UsageError` for a
    subclass with a forward pass of its own.
    """
    frozen: dict[nn.Module, FrozenBatchNorm2d] = {}
    for name, norm in list(module.named_modules(remove_duplicate=False)):
        if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
            if type(norm).forward not in _PLAIN:  # timm's have an activation in them, which would be lost
                raise rp.UsageError(
                    f"bn (='frozen') cannot fix {name!r}: a {type(norm).__name__} does more than batch normalization; accepted: "
                    "bn='trained'"
                )
            if norm not in frozen:
                frozen[norm] = FrozenBatchNorm2d.of(norm)
            if norm is module:
                return frozen[norm]
            parent, _, own_name = name.rpartition(".")
            setattr(module.get_submodule(parent), own_name, frozen[norm])
    return module
