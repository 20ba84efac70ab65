"""The engine and a layer without the wrappers."""

# page
import ml_dtypes
import numpy as np

from ktmoe_np import kt_kernel_ext as ext

E, P, H, I, T = 4, 2, 64, 32, 5
rng = np.random.default_rng(0)
gate, up, down = (
    (0.1 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)
    for shape in ((E, I, H), (E, I, H), (E, H, I))
)
x = rng.standard_normal((T, H)).astype(ml_dtypes.bfloat16)
ids = rng.integers(0, E, (T, P))
weights = rng.random((T, P), dtype=np.float32)
out = np.empty((T, H), ml_dtypes.bfloat16)

node = min(ext.topology()["node_cpus"])
engine = ext.CPUInfer(
    ext.WorkerPoolConfig(subpool_count=1, subpool_numa_map=[node], subpool_thread_count=[2])
)
config = ext.moe.MOEConfig(expert_num=E, num_experts_per_tok=P, hidden_size=H, intermediate_size=I)
config.pool = engine.backend_
moe = ext.moe.AMXBF16_MOE(config)

engine.submit(moe.load_weights_task(gate, up, down))
engine.submit(moe.forward_task(x, ids, weights, out))  # tasks run in the order of submission
engine.sync()  # waits, and raises what a task has raised
# end

assert np.isfinite(out.astype(np.float32)).all()
