"""Share the experts of all layers between the ranks of an MPI job, and compare with one process.

    mpiexec -n 2 --bind-to none python -m mpi4py examples/expert_parallel_mpi.py [CHECKPOINT]

Each rank maps its own experts and has its own tokens. Rank 0 also maps the whole first layer, to compare.
On several hosts add: --hostfile hosts --map-by ppr:1:node
"""

import argparse
import time

import ml_dtypes
import numpy as np
from mpi4py import MPI

from ktmoe_np import KTMoEWrapper
from ktmoe_np.distributed import ExpertParallel
from ktmoe_np.models import EMBEDDED_MODEL


def main() -> None:
    """Run a batch on every rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=EMBEDDED_MODEL)
    parser.add_argument("--tokens", type=int, default=32, help="of each rank")
    arguments = parser.parse_args()
    comm = MPI.COMM_WORLD

    moe = ExpertParallel.from_pretrained(arguments.checkpoint, 0, comm=comm)
    experts, slots = moe.config.num_experts, moe.config.num_experts_per_tok
    rng = np.random.default_rng(comm.rank)
    x = rng.standard_normal((arguments.tokens, moe.config.hidden_size)).astype(ml_dtypes.bfloat16)
    ids = np.argsort(rng.random((arguments.tokens, experts)), axis=1)[:, :slots]
    weights = np.full(ids.shape, 1 / slots, np.float32)

    y = moe.forward(x, ids, weights)  # collective
    comm.Barrier()
    begin = time.perf_counter()
    moe.forward(x, ids, weights, out=y)
    seconds = comm.allreduce(time.perf_counter() - begin, MPI.MAX)

    mine = moe.layer.config.num_experts
    spread = comm.gather((mine, MPI.Get_processor_name()))
    if spread is not None:  # rank 0
        whole = KTMoEWrapper.from_pretrained(arguments.checkpoint, 0)
        equal = (y == whole.forward(x, ids, weights)).all()
        for rank, (number, host) in enumerate(spread):
            print(f"rank {rank} on {host}: {number} of {experts} experts")
        print(f"{comm.size * arguments.tokens} tokens: {1e3 * seconds:.2f} ms")
        print(f"compared with one process: {'bit-identical' if equal else 'NOT the same'}")


if __name__ == "__main__":
    main()
