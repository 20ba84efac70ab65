"""ktmoe_np itself.

Options: ``call`` is out, forward, submit or jax; ``device``, of jax, is cpu or gpu; ``checkpoint`` is a
directory to load.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ...core.cases import Case
from ...core.layer import Array, Layer, bfloat16
from ...core.methods import METHODS
from ...core.spec import Spec

__all__ = ["LIBRARIES", "Backend", "backend_specs"]

#: Imported before the load is timed.
LIBRARIES: tuple[str, ...] = ("ktmoe_np._api",)


def backend_specs(base: Spec, options: Any) -> list[Spec]:
    """One per requested instruction set, which also measures the machine with it, and activation dtype."""
    from ktmoe_np import isa_info

    emulated = isa_info()["on_request"]  # their limits say nothing
    of_bf16 = METHODS[base.method].of_bf16
    spec = base.but(peer="ktmoe", copies=of_bf16 if of_bf16 < 1.0 else 0.0)
    return [
        spec.but(
            family=f"ktmoe {isa} {dtype}".rstrip(),
            isa=isa,
            activation_dtype=dtype,
            gives_limits=base.gives_limits and isa not in emulated,
        )
        for isa in options.isa
        for dtype in options.activation_dtype
    ]


def make_layer(spec: Spec, layer: Layer, **options: Any) -> Any:
    """Make a `KTMoEWrapper` with the shared weights; `options` are those of its mode."""
    from ktmoe_np import KTMoEWrapper

    shape, method = spec.shape, METHODS[spec.method]
    moe = KTMoEWrapper(
        layer_idx=0,
        num_experts=shape.experts,
        num_experts_per_tok=shape.per_token,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inter,
        cpuinfer_threads=spec.threads,
        activation=shape.activation,
        method=method.library_name,
        activation_dtype=spec.activation_dtype or None,
        **options,
    )
    moe.load_weights_from_tensors(**method.encode(layer))
    return moe


class Backend:
    """A layer of ktmoe_np that uses the shared weights in place, or quantizes them for itself."""

    def __init__(self, spec: Spec, layer: Layer) -> None:
        self._spec, self._layer = spec, layer
        self._moe = self._load()
        self._cases: list[Case] = []
        call = spec.options.get("call", "out")
        self.run: Callable[[int], None] = {
            "out": self._out,
            "forward": self._forward,
            "submit": self._submit,
            "jax": self._jax,
        }[call]

    def _load(self) -> Any:
        from ktmoe_np import KTMoEWrapper

        spec = self._spec
        if "checkpoint" in spec.options:
            path = spec.options["checkpoint"]
            method = METHODS[spec.method].library_name
            return KTMoEWrapper.from_pretrained(path, method=method, cpuinfer_threads=spec.threads)
        return make_layer(spec, self._layer)

    def load_again(self) -> float:
        """Seconds of another load, when modules, engine and files are warm."""
        start = time.perf_counter()
        self._load()
        return time.perf_counter() - start

    def prepare(self, cases: list[Case]) -> None:
        """See `bench.peers.Backend`."""
        self._cases = cases
        self._result = np.empty(cases[0].x.shape, bfloat16)
        if self.run == self._jax:
            self._prepare_jax()

    def _out(self, i: int) -> None:
        case = self._cases[i]
        self._moe.forward(case.x, case.ids, case.weights, out=self._result)

    def _forward(self, i: int) -> None:
        case = self._cases[i]
        self._result = self._moe.forward(case.x, case.ids, case.weights)

    def _submit(self, i: int) -> None:
        case = self._cases[i]
        self._moe.submit_forward(case.x, case.ids, case.weights, out=self._result)
        self._moe.sync_forward()

    def _prepare_jax(self) -> None:
        """Make the program, and its arrays, which JAX has with ids of 32 bits.

        A program runs where its arrays were put. Arrays that were not put anywhere go, with the program, to
        JAX's default device: a GPU where there is one.
        """
        import jax

        from ktmoe_np.jax import moe_forward

        self._program = jax.jit(lambda *case: moe_forward(self._moe, *case))
        self._jax_cases = [
            tuple(jax.device_put(jax.numpy.asarray(array), self._device()) for array in case[:3])
            for case in self._cases
        ]

    def _device(self) -> Any:
        """The device of JAX that is timed."""
        import jax

        return jax.devices(self._spec.options["device"])[0]

    def _jax(self, i: int) -> None:
        self._result = self._program(*self._jax_cases[i]).block_until_ready()

    def answer(self) -> dict[str, Array]:
        """See `bench.peers.Backend`."""
        if self.run == self._jax and self._result.devices() != {self._device()}:
            raise RuntimeError(f"ran on {self._result.devices()}, expected {self._device()}")
        return {"y": np.asarray(self._result)}

    def about(self) -> dict[str, Any]:
        """See `bench.peers.Backend`."""
        import ktmoe_np

        about = {
            "version": ktmoe_np.__version__,
            "isa": ktmoe_np.isa_info()["active"],
            "activation_dtype": self._moe.activation_dtype,
        }
        if self.run == self._jax:
            device = self._device()
            about["device"] = f"{device.platform}: {device.device_kind}"
        return about

    def limits(self, seconds: float) -> dict[str, Any]:
        """Measure what the machine can do with this backend's instruction set and threads."""
        from ktmoe_np import kt_kernel_ext as ext

        return dict(ext.measure_limits(self._moe.cpu_infer, seconds, product=self._moe.activation_dtype))
