"""Experts on several hosts: expert parallelism for inference and training, with the bits of one process.

Every rank of an MPI job makes a layer with its own experts and brings its own tokens::

    mpiexec -n 4 python -m mpi4py program.py

    from mpi4py import MPI
    from ktmoe_np.distributed import ExpertParallel

    moe = ExpertParallel.from_pretrained(path, layer_idx, comm=MPI.COMM_WORLD)
    y = moe.forward(hidden_states, topk_ids, topk_weights)  # collective; ids are of the whole layer

`ExpertParallelSFT` trains. Ranks may also be threads of one process (`ThreadCommunicator`), and links between
them slower than they are (`SimulatedLink`).
"""

from .channel import RankError
from .communicator import Communicator, Request, as_communicator
from .expert_parallel import ExpertParallel
from .expert_parallel_sft import ExpertParallelSFT
from .link import SimulatedLink
from .placement import Placement, balanced_owners, owners_of
from .reduce import reduce_gradients
from .threads import ThreadCommunicator

__all__ = [
    "Communicator",
    "ExpertParallel",
    "ExpertParallelSFT",
    "Placement",
    "RankError",
    "Request",
    "SimulatedLink",
    "ThreadCommunicator",
    "as_communicator",
    "balanced_owners",
    "owners_of",
    "reduce_gradients",
]
