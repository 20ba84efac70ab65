"""Layers on several ranks in JAX programs: the bits of one process, in the order of the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers import assert_same_bits, draw_batch, draw_layer
from mpi import run_ranks
from sft_layers import draw_student

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from ktmoe_np.distributed import ExpertParallel, ExpertParallelSFT, ThreadCommunicator  # noqa: E402
from ktmoe_np.jax import lora_parameters, moe_forward, moe_sft  # noqa: E402

pytestmark = pytest.mark.crosscheck

E, I, H, P, R = 5, 33, 64, 2, 3  # noqa: E741


def test_one_rank() -> None:
    rng = np.random.default_rng(0)
    layer = draw_layer(rng, E, I, H)
    batch = draw_batch(rng, layer, 7, P)
    (comm,) = ThreadCommunicator.create(1)
    moe = ExpertParallel(layer.wrapper(P), comm)
    program = jax.jit(lambda *arrays: moe_forward(moe, moe_forward(moe, *arrays), *arrays[1:]))
    first = layer.forward(batch)
    assert_same_bits(np.asarray(program(*batch)), layer.forward(batch._replace(x=first)))


def test_what_programs_refuse() -> None:
    rng = np.random.default_rng(1)
    student = draw_student(rng, (E, I, H), R)
    batch = draw_batch(rng, student.layer, 3, P)
    first, second = ThreadCommunicator.create(1)[0], ThreadCommunicator.create(1)[0]
    moe, sft = ExpertParallel(student.layer.wrapper(P), first), ExpertParallelSFT(student.wrapper(P), second)
    with pytest.raises(ValueError, match="index: got 0, expected None"):
        moe_forward(moe, *batch, index=0)
    with pytest.raises(ValueError, match="index: got 0, expected None"):
        moe_sft(sft, lora_parameters(sft), *batch, index=0)
    with pytest.raises(ValueError, match="activation_dtype"):
        moe_forward(moe, *batch, activation_dtype="int8")
    with pytest.raises(TypeError, match="moe_forward: has no derivative"):
        jax.grad(lambda x: moe_forward(moe, x, *batch[1:]).astype(jnp.float32).sum())(jnp.asarray(batch.x))


def test_gradients_of_one_rank() -> None:
    """With a scan over steps, as a training loop has them."""
    rng = np.random.default_rng(2)
    student = draw_student(rng, (E, I, H), R)
    batch = draw_batch(rng, student.layer, 6, P)
    sft = ExpertParallelSFT(student.wrapper(P), ThreadCommunicator.create(1)[0])
    alone = student.wrapper(P)

    def loss(lora: Any, layer: Any) -> Any:
        return jnp.square(moe_sft(layer, lora, *batch).astype(jnp.float32)).sum()

    def train(layer: Any) -> Any:
        def step(lora: Any, _: None) -> tuple[Any, Any]:
            value, grads = jax.value_and_grad(loss)(lora, layer)
            return jax.tree.map(lambda p, g: p - 1e-4 * g, lora, grads), value

        return jax.jit(lambda lora: jax.lax.scan(step, lora, None, length=3))(lora_parameters(layer))

    (got, losses), (expected, others) = train(sft), train(alone)
    assert_same_bits(np.asarray(losses), np.asarray(others))
    for name, value in expected.items():
        assert_same_bits(np.asarray(got[name]), np.asarray(value), name)


@pytest.mark.mpi
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks(num_ranks: int, tmp_path: Path) -> None:
    ended = run_ranks(
        num_ranks,
        """
        import numpy as np, jax, jax.numpy as jnp
        from mpi4py import MPI
        from layers import Batch, assert_same_bits, draw_batch
        from ranks import experts_of, picked
        from sft_layers import draw_student
        from dataclasses import replace
        from ktmoe_np.distributed import ExpertParallel, ExpertParallelSFT
        from ktmoe_np.jax import lora_parameters, moe_forward, moe_sft
        comm = MPI.COMM_WORLD
        E, I, H, P, R = 6, 33, 64, 2, 3
        student = draw_student(np.random.default_rng(0), (E, I, H), R)
        mine = experts_of("strided", E, comm)
        lora = {n: v[mine] for n, v in student.lora.items()}
        own = replace(student, layer=picked(student.layer, mine), lora=lora)
        parts = [own.layer.wrapper(P, cpuinfer_threads=1) for _ in range(2)]
        layers = [ExpertParallel(part, comm, placement="strided") for part in parts]
        sft = ExpertParallelSFT(own.wrapper(P, cpuinfer_threads=1), comm, placement="strided")
        def batch(rank):
            return draw_batch(np.random.default_rng(rank), student.layer, 3 * rank, P)
        batches = [batch(rank) for rank in range(comm.size)]
        x, ids, weights = batches[comm.rank]

        # Independent calls: without an order, XLA could start them differently on each rank.
        two = jax.jit(lambda x: [moe_forward(layer, x, ids, weights) for layer in layers])
        for got in two(x):
            assert_same_bits(np.asarray(got), student.layer.forward(batches[comm.rank]))

        alone = student.wrapper(P, cpuinfer_threads=1)
        together = Batch(*(np.concatenate(arrays) for arrays in zip(*batches)))
        def loss(lora, x, layer, batch):
            return moe_sft(layer, lora, x, *batch[1:]).astype(jnp.float32).sum()
        gradient = jax.grad(loss, argnums=(0, 1))
        whole = jax.jit(lambda lora: gradient(lora, together.x, alone, together))
        expected, expected_x = whole(lora_parameters(alone))
        part = jax.jit(lambda lora: gradient(lora, x, sft, batches[comm.rank]))
        got, got_x = part(lora_parameters(sft))
        for name, value in expected.items():
            assert_same_bits(np.asarray(got[name]), np.asarray(value)[mine], name)
        begin = sum(len(b.x) for b in batches[:comm.rank])
        assert_same_bits(np.asarray(got_x), np.asarray(expected_x)[begin:begin + len(x)])
        print("good")
        """,
        folder=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("good") == num_ranks
