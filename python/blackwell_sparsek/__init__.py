"""SparseK learnable sparse attention for PyTorch, with CPU and CUDA kernels.

Attention whose cost is linear in the sequence length: every query sees a window of recent keys and the ``num_selected`` keys
of its past with the largest learned scores (SparseK; Lou, Jia, Zheng, Tu, arXiv 2406.16747).

>>> import torch
>>> from blackwell_sparsek import attention_forward
>>> q, k, v = (torch.randn(1, 8, 1024, 64) for _ in range(3))
>>> out = attention_forward(q, k, v, scores=torch.randn(1, 8, 1024))

``attention_forward``          select and attend in one call
``attention_varlen_forward``   the same for packed sequences of different lengths
``select``, ``Selection``      which keys each query sees, to be reused
``key_norm_scores``            scores that need no training
``sparsek``                    the SPARSEK operator, a differentiable relaxation of top-k
``SparseKScorer``              the scores, learned from hidden states
``SparseKCache``               the keys and values that generation needs, in constant memory
``SparseKAttention``           a whole attention layer, to be trained
``capability``                 which kernel a call would run, or why none does
"""

from blackwell_sparsek import _core
from blackwell_sparsek.cache import SparseKCache
from blackwell_sparsek.capability import Capability, build_info, capability, show_config
from blackwell_sparsek.functional import (
    attention_forward,
    attention_varlen_forward,
    key_norm_scores,
    select,
    sparsek,
)
from blackwell_sparsek.modules import SparseKAttention, SparseKScorer
from blackwell_sparsek.selection import Selection, SelectionConfiguration

__version__ = _core.version()

__all__ = [
    "Capability",
    "Selection",
    "SelectionConfiguration",
    "SparseKAttention",
    "SparseKCache",
    "SparseKScorer",
    "__version__",
    "attention_forward",
    "attention_varlen_forward",
    "build_info",
    "capability",
    "key_norm_scores",
    "select",
    "show_config",
    "sparsek",
]
