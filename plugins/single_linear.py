"""One layer and nothing after the addition, y = W₁x + x: the strict reading of what §3.2 says of a single-layer branch.

    python -m studies.single_layer

The block `single` has the ReLU after the addition that all blocks of the paper have (Fig. 2); this one has none.
"""

from __future__ import annotations

from torch import nn

import resprobe as rp


@rp.register_block("single-linear")
class SingleLinearBlock(rp.BLOCKS["single"]):
    """One 3×3 convolution and its normalization, without a nonlinearity."""

    def make_activation(self) -> nn.Module:
        return nn.Identity()
