"""The names of KTransformers' kt-kernel, with its signatures: torch tensors in, torch tensors out.

A program that does ``from kt_kernel import KTMoEWrapper, generate_gpu_experts_masks``, as SGLang's expert
wrapper, takes them from here instead. docs/from-kt-kernel.md says parameter by parameter what differs.

Examples
--------
>>> import torch
>>> masks = generate_gpu_experts_masks(torch.tensor([[5.0, 1.0, 3.0], [4.0, 9.0, 0.0]]), num_gpu_experts=2)
>>> wrapper = KTMoEWrapper(0, 3, 2, 64, 32, masks[0], 1, 1, "", 512, method="BF16")
>>> gate, up, down = torch.randn(3, 32, 64), torch.randn(3, 32, 64), torch.randn(3, 64, 32)
>>> matrices = [matrix.to(torch.bfloat16) for matrix in (gate, up, down)]
>>> wrapper.load_weights_from_tensors(*matrices, torch.arange(3))
>>> x, ids = torch.randn(4, 64, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.int64)
>>> wrapper.forward(x, ids, torch.ones(4, 2), 0).abs().max()  # expert 0 is on the GPU
tensor(0., dtype=torch.bfloat16)
"""

from .factory import KTMoEWrapper, generate_gpu_experts_masks
from .inference import InferenceLayer
from .training import TrainingLayer

__all__ = ["InferenceLayer", "KTMoEWrapper", "TrainingLayer", "generate_gpu_experts_masks"]
