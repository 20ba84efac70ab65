"""Continue a text with the packaged model."""

# page
from ktmoe_np.models import MoEDecoder, generate

model = MoEDecoder.from_pretrained()  # or the path of a Qwen3-MoE, Mixtral or OLMoE model
text = bytes(generate(model, b"And God said, Let there be light: and there was", 27))
# end
assert text.decode() == " no more a man that is with"
