"""Ranks under mpiexec: the bits of one process, and jobs that end when a rank cannot go on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mpi import layer_script, run_ranks

pytestmark = [pytest.mark.mpi, pytest.mark.subprocess]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_inference(num_ranks: int, tmp_path: Path) -> None:
    ended = run_ranks(
        num_ranks,
        layer_script("""
for placement in ("contiguous", "strided"):
    for slice_tokens in (5, 2048):
        moe = parallel(placement=placement, slice_tokens=slice_tokens)
        for tokens in (1, 0, 40):
            mine = batch(comm.rank, tokens * (comm.rank + 1) // 2)
            assert_same_bits(moe.forward(*mine), layer.forward(mine))
        wrong = mine.ids + (E if comm.rank == comm.size - 1 else 0)
        try:
            moe.forward(mine.x, wrong, mine.weights)
        except RankError as error:
            assert str(error).startswith(f"rank {comm.size - 1}: IndexError"), error
        else:
            raise AssertionError("no error")
        assert_same_bits(moe.forward(*mine), layer.forward(mine))
print("good")
"""),
        folder=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("good") == num_ranks


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_training(num_ranks: int, tmp_path: Path) -> None:
    ended = run_ranks(
        num_ranks,
        layer_script("""
options = {"mode": "sft", "method": "AMXBF16_SFT", "lora_rank": 3, "cpuinfer_threads": 1}
mine = experts_of("strided", E, comm)
sft = ExpertParallelSFT(picked(layer, mine).wrapper(P, **options), comm, placement="strided")
whole = layer.wrapper(P, **options)
changed = {n: v + np.float32(0.01) for n, v in whole.lora_weights.items() if n.endswith("_b")}
whole.update_lora_weights(**changed)
sft.update_lora_weights(**{n: v[mine] for n, v in changed.items()})
batches = [batch(rank, 5 * rank + 1) for rank in range(comm.size)]
grads = [batch(rank + 9, 5 * rank + 1).x for rank in range(comm.size)]
expected = whole.forward_sft(*(np.concatenate(arrays) for arrays in zip(*batches)))
gradients = whole.backward(np.concatenate(grads))
rows = slice(sum(len(b.x) for b in batches[:comm.rank]), sum(len(b.x) for b in batches[:comm.rank + 1]))
for step in range(2):
    assert_same_bits(sft.forward_sft(*batches[comm.rank]), expected[rows])
    found = sft.backward(grads[comm.rank])
    assert_same_bits(found.grad_input, gradients.grad_input[rows])
    assert_same_bits(found.grad_weights, gradients.grad_weights[rows])
    for name, value in gradients.matrices.items():
        assert_same_bits(found.matrices[name], value[mine], name)
print("good")
"""),
        folder=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("good") == num_ranks


@pytest.mark.parametrize("runner", [(), ("",)], ids=["mpi4py", "python"])
def test_a_rank_that_leaves(runner: tuple[str, ...], tmp_path: Path) -> None:
    """The others give up in time, and the job ends instead of waiting in MPI's finalization."""
    began = time.monotonic()
    ended = run_ranks(
        2,
        layer_script("""
moe = parallel(timeout=1.0)
if comm.rank == 0:
    moe.forward(*batch(0, 3))
time.sleep(20)
"""),
        folder=tmp_path,
        runner=runner,
    )
    assert ended.returncode != 0
    assert "TimeoutError: comm: waited 1 s for all ranks to begin forward of layer 0" in ended.stderr
    assert time.monotonic() - began < 18


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = run_ranks(
        3,
        layer_script("""
moe = parallel()
moe.forward(*batch(comm.rank, 3))
if comm.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
moe.forward(*batch(comm.rank, 3))
"""),
        folder=tmp_path,
    )
    assert ended.returncode != 0
    assert time.monotonic() - began < 30


def test_a_rank_that_raises_between_layers(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = run_ranks(
        2,
        layer_script("""
first, second = parallel(), parallel()
first.forward(*batch(comm.rank, 3))
if comm.rank == 1:
    raise ValueError("something else")
second.forward(*batch(comm.rank, 3))
"""),
        folder=tmp_path,
    )
    assert ended.returncode != 0
    assert "ValueError: something else" in ended.stderr
    assert time.monotonic() - began < 30


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C while a rank waits ends the job, and says what it waited for."""
    ended = run_ranks(
        2,
        layer_script("""
moe = parallel()
if comm.rank == 0:
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        moe.forward(*batch(0, 3))
    except KeyboardInterrupt:
        try:
            moe.forward(*batch(0, 3))
        except RuntimeError as error:
            print(error)
    sys.exit(0)
time.sleep(20)
"""),
        folder=tmp_path,
        runner=("",),
    )
    assert ended.returncode != 0
    assert (
        "cannot be used any more: rank 0 was interrupted by KeyboardInterrupt while it waited for"
        in ended.stdout
    )


def test_what_is_no_communicator(tmp_path: Path) -> None:
    ended = run_ranks(
        2,
        layer_script("""
from ktmoe_np.distributed import as_communicator
try:
    as_communicator(MPI.COMM_SELF.Create_intercomm(0, comm, 1 - comm.rank, 1))
except TypeError as error:
    print(error)
"""),
        folder=tmp_path,
    )
    assert ended.stdout.count("comm: got an inter-communicator, expected the ranks of one group") == 2
