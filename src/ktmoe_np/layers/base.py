"""Common to layers of experts for inference and training: engine, config, weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from .. import kt_kernel_ext as ext
from ..arrays.checks import chosen_experts, expert_ids
from ..arrays.summary import object_summary
from ..arrays.types import ExpertArrays, IntegersLike, MaskLike, PathLike, StreamLike
from ..config import ActivationDtype, MoEConfig, activation_dtype_name
from ..config.activation_dtype import ACTIVATION_DTYPES
from ..cpuinfer import _MoEBase
from ..formats.methods import Method
from ..formats.weights import ExpertWeights, Projection
from ..gpu.masks import checked_mask
from ..io import SafetensorsCheckpoint, load_experts
from ..io.mapped import MappedFiles
from ..observe.stats import LayerStats
from ..passes.pending import is_of_a_handler
from .numbers import Numbers
from .options import WeightOptions, WeightSource

__all__ = ["LAYERS", "MoELayer"]

ConfigT = TypeVar("ConfigT", bound=ext.moe.MOEConfig)


#: All layers of the process, by number.
LAYERS: Numbers[MoELayer] = Numbers("layer")


class MoELayer(_MoEBase):
    """A layer of experts on the engine, before what is computed with it.

    Parameters
    ----------
    method : Method
        How weights are encoded and which class of the extension computes.
    config : MoEConfig
        Sizes and activation.
    gpu_experts_mask, cpuinfer_threads, threadpool_count, weight_path, numa_nodes, group_size
    activation_dtype
        See `KTMoEWrapper`.
    """

    def __init__(
        self,
        method: Method,
        config: MoEConfig,
        *,
        gpu_experts_mask: MaskLike | None = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: PathLike | None = None,
        numa_nodes: Sequence[int] | None = None,
        group_size: int | None = None,
        activation_dtype: ActivationDtype | None = None,
    ) -> None:
        self.config = config
        self.number = LAYERS.add(self)  #: under which operators of other libraries know the layer
        self._activation_dtype = activation_dtype_name(activation_dtype) or method.product
        self._has_other_dtype = self._activation_dtype != method.product
        self.group_size = method.resolve_group_size(group_size)
        self._set_method(method)
        self.weight_path = weight_path
        self._files = MappedFiles()  # of the weights
        self.set_gpu_experts_mask(gpu_experts_mask)
        self.cpu_infer = self._get_cpu_infer(cpuinfer_threads, threadpool_count, numa_nodes)
        self._layer = self._engine_layer(method)

    def _set_method(self, method: Method) -> None:
        """Take what the method says of the weights; `config` and `group_size` are set."""
        self.method = method.name

    def __repr__(self) -> str:
        return object_summary(self, self._summary)

    def _summary(self) -> str:
        """The layer's sizes and state, for `repr`."""
        c = self.config
        sizes = f"E={c.num_experts} P={c.num_experts_per_tok} H={c.hidden_size} I={c.moe_intermediate_size}"
        group = "" if self.group_size is None else f" in groups of {self.group_size}"
        dtype = f" with {self.activation_dtype} activations" if self._has_other_dtype else ""
        state = "loaded" if self.loaded else "not loaded"
        return f"layer {c.layer_idx}: {self.method}{group}{dtype}, {sizes} {c.activation.name}, {state}"

    @property
    def layer_idx(self) -> int:
        """The layer's number in the model."""
        return self.config.layer_idx

    @property
    def loaded(self) -> bool:
        """Whether the layer has weights."""
        return bool(self._layer.loaded)

    @property
    def activation_dtype(self) -> str:
        """What products take activations in where a call does not say: ``bfloat16`` or ``int8``."""
        return self._activation_dtype

    @property
    def activation_dtypes(self) -> tuple[str, ...]:
        """What products can take activations in, of a layer that is loaded."""
        return tuple(filter(self._has_dtype, ACTIVATION_DTYPES))

    def _has_dtype(self, name: str) -> bool:
        try:
            self._layer.check_activation_dtype(name)
        except ValueError:
            return False
        return True

    @abstractmethod
    def _engine_layer(self, method: Method) -> ext.moe.MoE_Interface:
        """Make the engine's layer."""

    def _engine_config(self, kind: type[ConfigT]) -> ConfigT:
        """A config of that class with the layer's sizes, activation and threads."""
        config, spec = self.config, self.config.activation
        layer = kind(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            config.layer_idx,
            self.cpu_infer.backend_,
        )
        layer.set_activation(spec.kind, spec.gated, spec.limit, spec.alpha, spec.beta1, spec.beta2)
        layer.scale_inputs = config.scale_inputs
        layer.activation_dtype = self._activation_dtype
        if self.group_size is not None:
            layer.group_size = self.group_size
        return layer

    def _dtype_of_call(self, activation_dtype: ActivationDtype | None) -> str | None:
        """The name of what a call takes activations in, None for the layer's own.

        Raises
        ------
        TypeError, ValueError
            No dtype for activations, or one that the layer's products cannot have.
        """
        name = activation_dtype_name(activation_dtype)
        if name is not None:
            self._layer.check_activation_dtype(name)
        return name

    @property
    @abstractmethod
    def expert_bytes(self) -> int:
        """Bytes of the weights of one expert."""

    # ---- statistics ----

    def collect_stats(self, on: bool = True) -> None:
        """Start, from zero, or stop to count and measure the passes of this layer.

        Costs two readings of the clock per phase of a pass while it is on, and nothing while it is off. Waits
        for a pass that is being computed.

        Parameters
        ----------
        on : bool
            False stops, and forgets what was counted.
        """
        self._layer.collect_stats(bool(on))

    def stats(self, reset: bool = False) -> LayerStats:
        """What was counted and measured since `collect_stats`, or since the last reset.

        Passes that are pending are not in it; one that is being computed is waited for. Passes of JAX and
        torch programs, and of CUDA streams, count like others.

        Parameters
        ----------
        reset : bool
            Start from zero again; no pass is lost or counted twice.

        Returns
        -------
        LayerStats

        Raises
        ------
        RuntimeError
            Nothing is collected, or there are no weights.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper, generate_gpu_experts_masks
        >>> moe = KTMoEWrapper(layer_idx=0, num_experts=3, num_experts_per_tok=2, hidden_size=4,
        ...                    moe_intermediate_size=2, activation="relu2")
        >>> gate, down = np.ones((3, 2, 4), ml_dtypes.bfloat16), np.ones((3, 4, 2), ml_dtypes.bfloat16)
        >>> moe.load_weights_from_tensors(gate, None, down)
        >>> moe.collect_stats()
        >>> ids, weights = np.array([[0, 2], [1, 2]]), np.full((2, 2), 0.5, np.float32)
        >>> y = moe.forward(np.ones((2, 4), ml_dtypes.bfloat16), ids, weights)
        >>> stats = moe.stats()
        >>> stats.forward_calls, stats.tokens, stats.weight_bytes == 3 * moe.expert_bytes
        (1, 2, True)
        >>> stats.expert_tokens.tolist(), list(stats.phase_seconds)
        ([1, 1, 2], ['combine', 'down', 'gate_up', 'route'])
        >>> generate_gpu_experts_masks([stats.expert_tokens.tolist()], 1).tolist()
        [[False, False, True]]
        """
        return LayerStats.of_engine(self._layer.stats(bool(reset)), self.expert_bytes)

    # ---- weights ----

    def load_weights(self, physical_to_logical_map: IntegersLike | None = None) -> None:
        """Load the layer from `weight_path`. Does nothing when it is loaded already.

        Parameters
        ----------
        physical_to_logical_map : array of int64 [E], optional
            Expert i uses the weights of the checkpoint's expert map[i].

        Raises
        ------
        RuntimeError
            The layer was made without a `weight_path`.
        FileNotFoundError, ValueError
            The checkpoint is not there, or does not have this layer: names file and tensor.
        OSError
            A file was cut off since it was opened.

        Notes
        -----
        Weights stay in their mapped files where the method allows it, so these must not be written to while
        the layer lives; to replace one, rename another file to its name. A pass raises OSError when a file
        has been cut off before it began. If that happens while the pass is pending or computed, or if no
        Python code begins the pass (replayed CUDA graphs, compiled JAX programs), reading what is gone ends
        the process with SIGBUS.
        """
        if self._may_load():
            self._load_from_path(WeightSource(self.config), physical_to_logical_map)

    def load_experts(self, experts: IntegersLike, num_experts: int) -> None:
        """Load some of the experts at `weight_path`. Does nothing when the layer is loaded already.

        The layer's expert i is the checkpoint's expert experts[i], and E of the layer is the number of these.
        Others are not read, converted or quantized; of a checkpoint with an index, files that hold only
        experts that are not among them are not opened, but for those that tell the encoding: the first three.

        Parameters
        ----------
        experts : array of int64 [E]
            Different experts of the checkpoint.
        num_experts : int
            Experts that the checkpoint's layer has.

        Raises
        ------
        RuntimeError
            The layer was made without a `weight_path`.
        TypeError
            Not integers.
        ValueError
            Another number of `experts` than the layer has, or one of them twice.
        IndexError
            An expert outside 0 to `num_experts` - 1.
        FileNotFoundError, ValueError, OSError
            See `load_weights`.

        Notes
        -----
        What `load_weights` says of mapped files holds here too.

        Examples
        --------
        >>> import ml_dtypes, numpy as np
        >>> from ktmoe_np import KTMoEWrapper
        >>> from ktmoe_np.models import EMBEDDED_MODEL
        >>> whole = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, layer_idx=1)
        >>> part = KTMoEWrapper(1, 2, 4, whole.config.hidden_size, whole.config.moe_intermediate_size,
        ...                     activation=whole.config.activation, weight_path=EMBEDDED_MODEL)
        >>> part.load_experts([7, 4], num_experts=16)
        >>> x, w = np.ones((1, 256), ml_dtypes.bfloat16), np.ones((1, 4), np.float32)
        >>> bool((part.forward(x, [[1, 0, 1, 0]], w) == whole.forward(x, [[4, 7, 4, 7]], w)).all())
        True
        """
        if self._may_load():
            config = replace(self.config, num_experts=num_experts)
            chosen = chosen_experts(experts, config.num_experts)
            if len(chosen) != self.config.num_experts:
                raise ValueError(
                    f"experts: got {len(chosen)}, expected {self.config.num_experts}, the layer's num_experts"
                )
            self._load_from_path(WeightSource(config, chosen))

    def _may_load(self) -> bool:
        """Whether there is something to load; RuntimeError without a `weight_path`."""
        if self.loaded:
            return False
        if self.weight_path is None:
            raise RuntimeError("weight_path: got None, expected a checkpoint to load from")
        return True

    @abstractmethod
    def _load_from_path(
        self, source: WeightSource, physical_to_logical_map: IntegersLike | None = None
    ) -> None:
        """Give the layer what it takes of the checkpoint at `weight_path`."""

    def _load_from_checkpoint(
        self,
        source: WeightSource,
        physical_to_logical_map: IntegersLike | None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Give the layer the experts of the Hugging Face checkpoint at `weight_path`."""
        assert self.weight_path is not None
        self._checkpoint = SafetensorsCheckpoint.shared(self.weight_path)
        experts = load_experts(self._checkpoint, self.layer_idx, *source)
        biases = experts.bias_arguments()
        options = WeightOptions(
            gate_bias=biases["gate_bias"], up_bias=biases["up_bias"], down_bias=biases["down_bias"]
        )
        if progress is not None:
            options["progress"] = progress
        self.load_weights_from_tensors(
            experts.gate.codes,
            None if experts.up is None else experts.up.codes,
            experts.down.codes,
            physical_to_logical_map,
            **options,
        )

    def _give_to_engine(self, weights: ExpertWeights, physical_to_logical_map: IntegersLike | None) -> None:
        """Give the engine's layer its weights, as its class takes them."""
        if physical_to_logical_map is not None:
            physical_to_logical_map = expert_ids(physical_to_logical_map, "physical_to_logical_map")
        files = MappedFiles(array for p in weights.projections.values() for array in vars(p).values())
        files.check()
        task = self._layer.load_weights_task(
            **{name: to_engine(p) for name, p in {"up_proj": None, **weights.projections}.items()},
            **weights.bias_arguments(),
            physical_to_logical_map=physical_to_logical_map,
        )
        before, self._files = self._files, MappedFiles() if self._spans_nodes() else files
        was_loaded = self.loaded
        self._loaded.add(self)
        try:
            self.cpu_infer.run(task)
        except Exception as error:
            # After the task's own error the layer is as it was; after an interrupt the task still runs.
            if not is_of_a_handler(error):
                self._files = before
                if not was_loaded:
                    self._loaded.discard(self)
            raise

    def _spans_nodes(self) -> bool:
        """Whether every NUMA node has its own copy of its rows, so that the source need not be kept alive."""
        return len(set(self.cpu_infer.backend_.config.subpool_numa_map)) > 1

    @abstractmethod
    def load_weights_from_tensors(
        self,
        gate_proj: ExpertArrays,
        up_proj: ExpertArrays | None,
        down_proj: ExpertArrays,
        physical_to_logical_map: IntegersLike | None = None,
        **options: Unpack[WeightOptions],
    ) -> None:
        """Give the layer its weights, with the scales, formats and biases that its method takes."""

    def set_gpu_experts_mask(self, gpu_experts_mask: MaskLike | None) -> None:
        """Name the experts that someone else computes; from the next call on they are skipped here.

        Parameters
        ----------
        gpu_experts_mask : array of bool [E], or None for none

        Raises
        ------
        ValueError
            Another shape.
        TypeError
            Another dtype.
        """
        # A new array for a new mask: calls under way keep theirs.
        mask = checked_mask(gpu_experts_mask, self.config.num_experts)
        self.gpu_experts_mask: NDArray[np.bool_] | None = mask if mask.any() else None

    @staticmethod
    def _check_stream(cuda_stream: StreamLike | None) -> None:
        if cuda_stream is not None:
            raise RuntimeError(f"cuda_stream: got {cuda_stream!r}, expected None: arrays are on the CPU")


def to_engine(projection: Projection | None) -> ext.moe.Projection | None:
    """Convert a projection to the engine's own; a global scale has become a channel scale before."""
    if projection is None:
        return None
    return ext.moe.Projection(
        projection.codes,
        block_scales=projection.block_scales,
        channel_scale=projection.channel_scale,
        format=projection.format,
    )
