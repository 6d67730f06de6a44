"""What one would use instead of an op: each peer under an honest label, with the version of what does the work.

A peer that cannot run here says why and is reported; it never fails the run. Every peer's results are compared with
the op's before it is timed.
"""

from __future__ import annotations

from torch.nn.attention import SDPBackend

from .attention import Flex, ForcedSDPA, JoinedSDPA, PreallocatedSDPA
from .base import Peer, disagreement
from .eager import Compiled, Eager, Reference
from .gpu import MambaTriton, TritonMoE
from .moe import CutlassMoE, ExpertLoop, GroupedMM, MmaKernel
from .scan import ChunkedScan, SequentialScan

ALL: list[Peer] = [
    Reference(),
    Eager(),
    Compiled(),
    SequentialScan(),
    ChunkedScan(),
    ExpertLoop(),
    GroupedMM(),
    MmaKernel(),
    CutlassMoE(),
    JoinedSDPA(),
    PreallocatedSDPA(),
    ForcedSDPA("flash", SDPBackend.FLASH_ATTENTION),
    ForcedSDPA("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
    ForcedSDPA("cuDNN", SDPBackend.CUDNN_ATTENTION),
    ForcedSDPA("math", SDPBackend.MATH),
    Flex(),
    MambaTriton(),
    TritonMoE(),
]

__all__ = ["ALL", "Peer", "disagreement"]
