"""Layers in a compiled JAX program: scan over layers, gradients of adapters."""
# needs: jax

# page
import jax
import jax.numpy as jnp

from ktmoe_np import KTMoEWrapper
from ktmoe_np.jax import lora_parameters, moe_forward, moe_sft
from ktmoe_np.models import EMBEDDED_MODEL

layers = [KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, i) for i in range(3)]
E, P, H = (getattr(layers[0].config, n) for n in ("num_experts", "num_experts_per_tok", "hidden_size"))


def step(x, index):
    """One layer: route, then run the experts of layer `index`."""
    weights, ids = jax.lax.top_k(jax.nn.softmax(x[:, :E].astype(jnp.float32)), P)
    return moe_forward(layers, x, ids, weights, index=index), None


@jax.jit
def program(x):
    """All layers, in one call of the compiled program."""
    return jax.lax.scan(step, x, jnp.arange(len(layers)))[0]


x = jax.random.normal(jax.random.key(0), (4, H), jnp.bfloat16)
y = program(x)
# end
assert y.shape == x.shape

# training
sft = KTMoEWrapper.from_pretrained(EMBEDDED_MODEL, 0, mode="sft", lora_rank=4)
sft.init_lora_weights()
lora = lora_parameters(sft)  # a dict of JAX arrays, so optax trains them
weights, ids = jax.lax.top_k(jax.nn.softmax(x[:, :E].astype(jnp.float32)), P)


def loss(lora, x):
    """Half the squared norm of the output."""
    return 0.5 * jnp.square(moe_sft(sft, lora, x, ids, weights).astype(jnp.float32)).sum()


by_lora, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(lora, x)
# end training
assert by_x.shape == x.shape
assert set(by_lora) == set(lora)
