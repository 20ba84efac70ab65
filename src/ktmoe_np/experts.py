"""KTMoEWrapper: the factory of expert layers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

from .arrays.checks import chosen_experts
from .arrays.types import ArrayLike, MaskLike, PathLike, StreamLike
from .buffers import KExpertsCPUBuffer, KExpertsSFTBuffer
from .config import ActivationDtype, MoEConfig, parse_activation
from .cpuinfer import _MoEBase
from .formats.methods import Method, find_method, training_name
from .inference.base import BaseMoEWrapper
from .io import SafetensorsCheckpoint
from .io.converted.manifest import manifest_path, read_manifest
from .io.gguf.experts import is_gguf
from .io.json_text import naming_file
from .io.layer_config import check_fits, layer_config
from .io.native import native_group_size, native_method
from .layers.options import ActivationLike, LayerOverrides
from .passes.deferral import DeferralChain
from .sft.base import BaseSFTMoEWrapper
from .sft.options import SFTKeywords, SFTOptions, check_no_options

__all__ = ["InferenceOverrides", "KTMoEWrapper", "Overrides", "SFTOverrides"]


class InferenceOverrides(LayerOverrides, total=False):
    """Keyword arguments of `KTMoEWrapper.from_pretrained` in mode ``inference``."""

    max_deferred_experts_per_token: int


class SFTOverrides(LayerOverrides, SFTKeywords, total=False):
    """Keyword arguments of `KTMoEWrapper.from_pretrained` in mode ``sft``."""


class Overrides(InferenceOverrides, SFTOverrides, total=False):
    """Those of both modes, to be passed on; the mode decides which of them are taken."""


class KTMoEWrapper:
    """Make the wrapper of one layer of experts.

    The instance is of the class that serves `mode` and `method`; `BaseMoEWrapper` documents what layers for
    inference do, and `BaseSFTMoEWrapper` those for training.

    Parameters
    ----------
    layer_idx : int
        The layer's number in the model.
    num_experts : int
        E, the routed experts.
    num_experts_per_tok : int
        P, the experts of a token.
    hidden_size : int
        H.
    moe_intermediate_size : int
        I.
    gpu_experts_mask : array of bool [E], optional
        Experts that are computed elsewhere and skipped here.
    cpuinfer_threads : int, optional
        Threads of the engine; None takes the CPUs that this process may use.
    threadpool_count : int, optional
        Sub-pools of the engine; None takes one for every NUMA node.
    weight_path : str or path-like, optional
        The checkpoint that `load_weights` reads: of Hugging Face, or, with methods that quantize, also a
        directory that `save_weights` or ``ktmoe convert`` has written.
    chunked_prefill_size : int
        Inference only: tokens computed per chunk. Limits scratch memory, not batch size.
    method : str
        How weights are encoded, and for training what is trained. Of mode ``inference``: ``BF16``, ``FP8``
        and others read a checkpoint's own encoding; ``LLAMAFILE`` reads GGUF's; ``AMXINT8`` and ``AMXINT4``
        quantize weights and activations; ``MOE_INT8`` and ``MOE_INT4`` quantize weights alone. Of mode
        ``sft``, which trains adapters on the same base weights: the same with the suffix ``_SFT``;
        ``AMXBF16_SFT`` and ``AMXFP8_SFT`` mean ``BF16_SFT`` and ``FP8_SFT``. Each with ``_SkipLoRA`` behind
        it for gradients of the input and the routing weights alone. `ktmoe_np.kt_kernel_ext.methods` lists
        them all.
    mode : str
        ``inference`` or ``sft``.
    numa_nodes : sequence of int, optional
        The NUMA node of each sub-pool; a node may be named twice.
    max_deferred_experts_per_token : int
        Inference only: experts per token whose result may be added to the next layer's output.
    activation : str, ActivationSpec or mapping
        See `ktmoe_np.config.parse_activation`.
    group_size : int, optional
        How many columns of a row share a scale, where there is a choice. ``AMXINT4``, ``MOE_INT4``,
        ``RAWINT4`` and ``INT4_ZP``: 32 (which None means too), 64 or 128; ``MOE_INT8``: 32, or None for one
        scale per row; others: None. The same with ``_SFT``. `from_pretrained` finds that of ``RAWINT4``, and
        for ``INT4_ZP``, whose groups may be longer, the largest that divides them.
    scale_inputs : bool
        Routing weights scale the inputs of the experts, as in Llama-4: the expert of slot p of token t takes
        bf(topk_weights[t, p] * hidden_states[t]), and its output has weight 1. Adapters take the same rows.
        Which slots are deferred still depends on the weights.
    activation_dtype : {"bfloat16", "int8"} or dtype, optional
        What products take activations in: a row, bf16, is quantized in blocks that each have a scale, or it
        is not. ``int8`` is for weights that are integers with scales: ``LLAMAFILE`` with quantized tensor
        types, ``RAWINT4``, ``GPTQ_INT4``, ``INT4_ZP``, ``MXFP4``, ``NVFP4``, ``MOE_INT8`` and ``MOE_INT4``;
        projections in F32, F16 or BF16 beside them stay in bf16. None is the method's own: ``int8`` for
        ``AMXINT8`` and ``AMXINT4``, which have no other and one scale per row, ``bfloat16`` for all others.
        Every call may override it. `ktmoe_np.reference.moe_forward` defines the products.
    lora_rank, lora_alpha, lora_dropout, max_cache_depth, full_weight_grad, recompute, seed, cache_dtype
        Of mode ``sft``, by keyword: see `ktmoe_np.sft.SFTOptions`.
    reuse_buffers : bool
        Of mode ``sft``, by keyword: write the results of a step to the memory of the step before; see
        `ktmoe_np.sft.SFTOptions` for how long they are valid.

    Raises
    ------
    ValueError
        An unknown method, mode or activation, invalid sizes, options of the other mode, or an
        `activation_dtype` that the weights do not have.
    TypeError
        An unknown keyword, or a value of the wrong type.
    RuntimeError
        The arguments need another engine than the existing one.

    Examples
    --------
    >>> moe = KTMoEWrapper(layer_idx=3, num_experts=8, num_experts_per_tok=2, hidden_size=64,
    ...                    moe_intermediate_size=32, method="BF16")
    >>> type(moe).__name__, moe.loaded
    ('NativeMoEWrapper', False)
    >>> sft = KTMoEWrapper(layer_idx=3, num_experts=8, num_experts_per_tok=2, hidden_size=64,
    ...                    moe_intermediate_size=32, mode="sft", method="AMXBF16_SFT", lora_rank=4)
    >>> type(sft).__name__, sft.options.lora_alpha
    ('NativeSFTMoEWrapper', 32.0)
    """

    @overload
    def __new__(  # type: ignore[misc]  # a factory: instances are of the method's class
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: MaskLike | None = ...,
        cpuinfer_threads: int | None = ...,
        threadpool_count: int | None = ...,
        weight_path: PathLike | None = ...,
        chunked_prefill_size: int = ...,
        method: str = ...,
        mode: Literal["inference"] = ...,
        numa_nodes: Sequence[int] | None = ...,
        max_deferred_experts_per_token: int = ...,
        activation: ActivationLike = ...,
        group_size: int | None = ...,
        scale_inputs: bool = ...,
        activation_dtype: ActivationDtype | None = ...,
    ) -> BaseMoEWrapper: ...

    @overload
    def __new__(  # type: ignore[misc]
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: MaskLike | None = ...,
        cpuinfer_threads: int | None = ...,
        threadpool_count: int | None = ...,
        weight_path: PathLike | None = ...,
        chunked_prefill_size: int = ...,
        *,
        method: str,
        mode: Literal["sft"],
        numa_nodes: Sequence[int] | None = ...,
        max_deferred_experts_per_token: Literal[0] = ...,
        activation: ActivationLike = ...,
        group_size: int | None = ...,
        scale_inputs: bool = ...,
        activation_dtype: ActivationDtype | None = ...,
        **sft: Unpack[SFTKeywords],
    ) -> BaseSFTMoEWrapper: ...

    def __new__(
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: MaskLike | None = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: PathLike | None = None,
        chunked_prefill_size: int = 4096,
        method: str = "BF16",
        mode: str = "inference",
        numa_nodes: Sequence[int] | None = None,
        max_deferred_experts_per_token: int = 0,
        activation: ActivationLike = "silu",
        group_size: int | None = None,
        scale_inputs: bool = False,
        activation_dtype: ActivationDtype | None = None,
        **sft: Unpack[SFTKeywords],
    ) -> Any:
        """Make the wrapper; see the class."""
        found = find_method(method, mode)
        found.resolve_group_size(group_size)  # said before anything else
        config = MoEConfig(
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            activation=parse_activation(activation),
            layer_idx=layer_idx,
            scale_inputs=scale_inputs,
        )
        module, name = found.wrapper.split(":")
        wrapper = getattr(importlib.import_module(f".{module}", __package__), name)
        return wrapper(
            found,
            config,
            gpu_experts_mask=gpu_experts_mask,
            cpuinfer_threads=cpuinfer_threads,
            threadpool_count=threadpool_count,
            weight_path=weight_path,
            numa_nodes=numa_nodes,
            group_size=group_size,
            activation_dtype=activation_dtype,
            **_of_mode(found, chunked_prefill_size, max_deferred_experts_per_token, sft),
        )

    @overload
    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        layer_idx: int = 0,
        method: str | None = None,
        mode: Literal["inference"] = "inference",
        **overrides: Unpack[InferenceOverrides],
    ) -> BaseMoEWrapper: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        layer_idx: int = 0,
        method: str | None = None,
        *,
        mode: Literal["sft"],
        **overrides: Unpack[SFTOverrides],
    ) -> BaseSFTMoEWrapper: ...

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        layer_idx: int = 0,
        method: str | None = None,
        mode: Literal["inference", "sft"] = "inference",
        **overrides: Unpack[Overrides],
    ) -> BaseMoEWrapper | BaseSFTMoEWrapper:
        """Make and load a layer of a checkpoint, whose ``config.json`` or GGUF header gives the sizes.

        Parameters
        ----------
        path : str or path-like
            The directory of a Hugging Face checkpoint, or one that ``ktmoe convert`` has written; or a GGUF
            file, any file of a split one, or a directory with one.
        layer_idx : int
            The layer.
        method : str, optional
            None takes what the layer is encoded in. Of a directory that ``ktmoe convert`` has written that is
            what it was converted for; the directory also gives the group size. With ``_SFT`` for training.
        mode : str
            ``inference`` or ``sft``.
        **overrides
            Any other parameter of `KTMoEWrapper`, and the `physical_to_logical_map` of `load_weights`. With
            `experts` the layer's experts are these of the checkpoint, in this order, and their number is its
            E; `num_experts` is then what the checkpoint has.

        Returns
        -------
        BaseMoEWrapper, or BaseSFTMoEWrapper with ``mode="sft"``
            The loaded layer.

        Raises
        ------
        FileNotFoundError
            `path`, or a file that its index names, does not exist.
        ValueError
            A size that the config lacks, contradicts itself about, or that the files are too small for; an
            unknown activation; a layer without experts; a tensor that is missing or has another dtype or
            shape; an unknown method, or one that does not read this checkpoint.
        OSError
            A file cannot be read, or was truncated.

        Notes
        -----
        Routing is the caller's: `forward` takes ids and final weights, and normalizes nothing. How the
        routers in transformers weigh the P experts of a token, by the model's config.json where it says so:

        =============================  ================  =============  ==============  =======
        Family                         Scores            Normalized     Factor          Scale
        =============================  ================  =============  ==============  =======
        Mixtral, Qwen3.5-MoE, Hunyuan  softmax           yes            none            outputs
        Qwen2-MoE, Qwen3-MoE, OLMoE    softmax           by the config  none            outputs
        Qwen3-Next                     softmax           by the config  none            outputs
        gpt-oss, Granite, Aria         softmax of the P  yes            none            outputs
        ERNIE-4.5                      softmax           yes            none            outputs
        Gemma-4                        softmax           yes            one per expert  outputs
        Jamba                          softmax           no             none            outputs
        Phi-MoE                        masked softmax    no             none            outputs
        DeepSeek-V2, LongCat-Flash     softmax           no             by the config   outputs
        DeepSeek-V3, Kimi, GLM-4.5     sigmoid           by the config  by the config   outputs
        dots.1, Nemotron-H, LFM2-MoE   sigmoid           by the config  by the config   outputs
        DeepSeek-V4                    ``scoring_func``  yes            by the config   outputs
        MiniMax-M2                     sigmoid           yes            none            outputs
        MiniMax-M3, Step-3.7           sigmoid           yes            by the config   outputs
        Llama-4                        sigmoid           no             none            inputs
        =============================  ================  =============  ==============  =======

        Normalized weights are divided by their sum, if ``norm_topk_prob`` where that is by the config. The
        factor is ``routed_scaling_factor`` (``moe_router_scaling_factor`` in Step-3.7), also where a model
        applies it to the sum of its experts. A bias that corrects which experts are chosen is never part of
        the weights. Shared experts and LongCat's identity experts are the caller's.

        Where weights scale the inputs, the layer is made with ``scale_inputs=True``: found by the
        ``model_type`` of the config.json (``llama4``, ``llama4_text``) or the architecture of the GGUF file
        (``llama4``).

        Examples
        --------
        >>> from ktmoe_np.models import EMBEDDED_MODEL
        >>> moe = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, layer_idx=1)
        >>> moe.config.num_experts, moe.config.hidden_size, moe.method, moe.loaded
        (16, 256, 'BF16', True)
        >>> sft = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, 1, mode="sft", lora_rank=8)
        >>> sft.method, sft.options.lora_rank
        ('AMXBF16_SFT', 8)
        """
        config, native, group_size = _read_layer(
            path, layer_idx, method is None or bool(find_method(method, mode).encodings)
        )
        check_fits(config, overrides.get("weight_path") or path)
        sizes = {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "hidden_size": config.hidden_size,
            "moe_intermediate_size": config.moe_intermediate_size,
            "activation": config.activation,
            "scale_inputs": config.scale_inputs,
        }
        options: dict[str, Any] = {**sizes, "weight_path": path, **overrides}
        physical_to_logical_map = options.pop("physical_to_logical_map", None)
        experts, num_experts = options.pop("experts", None), options["num_experts"]
        if experts is not None:
            if physical_to_logical_map is not None:
                raise ValueError("physical_to_logical_map: got one, expected None: experts gives the order")
            experts = chosen_experts(experts, num_experts)
            options["num_experts"] = len(experts)
        if method is None and native is not None:
            method = training_name(native) if mode == "sft" else native
        found = find_method(method, mode)
        if group_size in (found.formats or found.encodings):
            options = {"group_size": group_size, **options}
        moe: BaseMoEWrapper | BaseSFTMoEWrapper
        moe = cls(layer_idx=layer_idx, method=found.name, mode=mode, **options)
        moe.config = moe.config.with_sources_of(config)
        if experts is None:
            moe.load_weights(physical_to_logical_map)
        else:
            moe.load_experts(experts, num_experts)
        return moe

    @staticmethod
    def set_capture_batch_sizes(capture_batch_sizes: Sequence[int]) -> None:
        """See `KExpertsCPUBuffer.set_capture_batch_sizes`."""
        KExpertsCPUBuffer.set_capture_batch_sizes(capture_batch_sizes)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """See `KExpertsCPUBuffer.get_capture_batch_sizes`."""
        return KExpertsCPUBuffer.get_capture_batch_sizes()

    @staticmethod
    def reset_engine() -> None:
        """End the engine of this process, so that the next layer makes another, with other threads.

        Raises
        ------
        RuntimeError
            Layers are loaded on it: delete them first. (Not in a forked child, where it cannot run any more.)

        Examples
        --------
        >>> KTMoEWrapper.reset_engine()  # doctest: +SKIP
        >>> moe = KTMoEWrapper(0, 8, 2, 64, 32, cpuinfer_threads=2)  # doctest: +SKIP
        """
        _MoEBase.reset_cpu_infer()

    @staticmethod
    def clear_buffer_cache() -> None:
        """See `KExpertsCPUBuffer.clear_buffer_cache`."""
        KExpertsCPUBuffer.clear_buffer_cache()

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """See `KExpertsSFTBuffer.clear_buffer_cache`."""
        KExpertsSFTBuffer.clear_buffer_cache()

    @staticmethod
    def drain_deferred(
        cuda_stream: StreamLike | None = None,
        *,
        out: ArrayLike | None = None,
        chain: DeferralChain | None = None,
    ) -> Any:
        """See `BaseMoEWrapper.drain_deferred`."""
        return BaseMoEWrapper.drain_deferred(cuda_stream, out=out, chain=chain)


def _read_layer(
    path: PathLike, layer_idx: int, look_at_layer: bool
) -> tuple[MoEConfig, str | None, int | None]:
    """Read a layer of a checkpoint: its config and, with `look_at_layer`, the method and the group size.

    No method is that of the mode; the group size is that of a directory that ``ktmoe convert`` has written,
    or of a checkpoint's own encoding.
    """
    config = layer_config(path, layer_idx)
    if is_gguf(path):
        return config, "LLAMAFILE", None
    if manifest_path(path).exists():
        manifest = read_manifest(path)
        with naming_file(manifest_path(path)):
            group_size = find_method(manifest.method, "inference").resolve_group_size(manifest.group_size)
        return config, manifest.method, group_size
    if not look_at_layer:
        return config, None, None
    checkpoint = SafetensorsCheckpoint.shared(path)
    return config, native_method(checkpoint, layer_idx), native_group_size(checkpoint, layer_idx)


def _of_mode(method: Method, chunk_size: int, num_deferred: int, sft: SFTKeywords) -> dict[str, Any]:
    """The arguments that only the wrappers of the method's mode take."""
    if method.mode == "inference":
        check_no_options(method.mode, sft)
        return {"chunked_prefill_size": chunk_size, "max_deferred_experts_per_token": num_deferred}
    if num_deferred != 0:
        raise ValueError(
            f"max_deferred_experts_per_token: got {num_deferred!r}, expected 0: only inference defers experts"
        )
    return {"options": SFTOptions.of(method, sft)}
