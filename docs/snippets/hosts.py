"""A layer whose experts are shared by the ranks of a job."""
# needs: mpi4py

# page
import ml_dtypes
import numpy as np
from mpi4py import MPI

from ktmoe_np.distributed import ExpertParallel
from ktmoe_np.models import EMBEDDED_MODEL  # or the path of your checkpoint, the same on every machine

comm = MPI.COMM_WORLD
moe = ExpertParallel.from_pretrained(EMBEDDED_MODEL, layer_idx=0, comm=comm)
E, P, H = moe.config.num_experts, moe.config.num_experts_per_tok, moe.config.hidden_size

rng = np.random.default_rng(comm.rank)
T = 3 + comm.rank  # the tokens of this rank, also none
x = rng.standard_normal((T, H)).astype(ml_dtypes.bfloat16)
ids = np.stack([rng.permutation(E)[:P] for _ in range(T)])  # ids of the whole layer
weights = np.full((T, P), 1 / P, np.float32)
y = moe.forward(x, ids, weights)  # all ranks call it together
# end

from ktmoe_np import KTMoEWrapper

assert (y == KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, 0).forward(x, ids, weights)).all()
