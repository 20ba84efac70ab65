"""Mixture-of-experts layers on CPUs, from NumPy: inference and LoRA training.

What programs use, in the order in which they need it (``help(ktmoe_np.NAME)`` documents each):

Make a layer
    KTMoEWrapper                makes a layer, from its sizes or from a checkpoint
    MoEConfig                   the sizes and the activation of a layer
    parse_activation            reads an activation by its name
    ActivationSpec              an activation and its parameters
    isa_info                    the instruction sets of this machine, and which one is used

Run it
    BaseMoEWrapper              a layer for inference: load weights, forward, submit and sync
    DeferralChain               the experts that a pass leaves to the next layer
    KExpertsCPUBuffer           buffers for fixed batch sizes

Train adapters
    BaseSFTMoEWrapper           a layer for training: forward, backward, LoRA weights
    SFTGradients                what a backward pass gives
    KExpertsSFTBuffer           buffers of training steps

Share the experts with a GPU
    generate_gpu_experts_masks  picks the experts that are used most
    GPUExperts                  computes the picked experts on the GPU

Observe it
    LayerStats                  what a layer counted and measured: `collect_stats`, `stats`
    trace                       writes a timeline of tasks by worker, for Perfetto

Check the results
    reference                   the specification in NumPy, with error bounds

The classes that `KTMoEWrapper` makes, by method and mode
    NativeMoEWrapper            weights in the checkpoint's own encoding: bf16, fp8, fp4, int4
    LlamafileMoEWrapper         GGUF weights
    AMXMoEWrapper               int8 or int4 weights, products in int8
    GeneralMoEWrapper           int8 or int4 weights, products in bf16
    NativeSFTMoEWrapper         training on the weights of `NativeMoEWrapper`
    LlamafileSFTMoEWrapper      training on GGUF weights
    QuantizedSFTMoEWrapper      training on int8 and int4 weights
    AMXSFTMoEWrapper            the base of these three

Modules
    io                          checkpoints: safetensors, GGUF, converted directories
    models                      a decoder with experts, for generation and training
    sft                         options of training, adapters in PEFT directories
    jax                         layers in compiled JAX programs
    torch                       layers under autograd, and in models of transformers
    compat.kt_kernel            the names and signatures of KTransformers' kt-kernel
    config                      sizes and activations, read from a model's config
    kt_kernel_ext               the extension: engine and layers as C++ has them
"""

from __future__ import annotations

__version__ = "0.2.0"

TYPE_CHECKING = False  # as in typing, which is not imported for it

# The names come from `_api`, which is imported when the first of them is used. So the command `ktmoe`, a part
# of this package, is in control (of Ctrl-C, of a wrong KTMOE_ISA) before NumPy and the extension are loaded.
if TYPE_CHECKING:
    from ._api import *  # noqa: F403
else:

    def __getattr__(name):
        """Import a module of the package, or what the package offers."""
        from importlib import import_module
        from importlib.util import find_spec

        if name == "__all__" or (name.isidentifier() and not name.startswith("__")):
            if name not in ("cli", "kt_kernel_ext"):
                # Threads that want different modules all take this one first. A thread that imported a module
                # of a package while another imports the package would wait for it in a circle. The extension
                # imports nothing of the package, and modules that `_api` imports need it.
                import_module(f"{__name__}._api")
            module = f"{__name__}.{name}"
            if find_spec(module) is not None:
                return import_module(module)
            offered = vars(import_module(f"{__name__}._api"))
            if name in offered:
                return globals().setdefault(name, offered[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
