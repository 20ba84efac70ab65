"""Models of transformers with replaced experts train as the same models in torch do.

The truth is the model with experts written out in torch in float64, with the same parameters and the same
routing. What bounds the error is that of a peer: the same experts in torch's bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch_models import FAMILIES, VOCAB, TorchExperts, blocks_of, replayed_routing, saved_model, tiny_model  # noqa: E402

from ktmoe_np.torch import replace_experts  # noqa: E402

pytestmark = pytest.mark.crosscheck

RANK, ALPHA, STEPS = 3, 6.0, 3


def drawn_tokens(seed: int) -> Any:
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, tokens: Any) -> Any:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


class Trio:
    """The model with our experts, with those of torch in float64, and in bfloat16."""

    def __init__(self, family: str, directory: Path) -> None:
        path = saved_model(family, directory)
        ours, truth, peer = (tiny_model(family) for _ in range(3))
        originals = [block.experts for block in blocks_of(truth)]
        replaced = replace_experts(ours, path, mode="sft", lora_rank=RANK, lora_alpha=ALPHA)
        assert replaced == len(originals)
        generator = torch.Generator().manual_seed(1)
        for block in blocks_of(ours):
            with torch.no_grad():
                for name, p in block.experts.lora.items():
                    if name.endswith("_b"):  # zero at first, which would hide half of the gradients
                        p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        self.truth, self.peer = truth.double(), peer
        for model, dtype in ((self.truth, torch.float64), (self.peer, torch.bfloat16)):
            for block, mine, original in zip(blocks_of(model), blocks_of(ours), originals, strict=True):
                block.experts = TorchExperts(original, mine.experts.lora, ALPHA / RANK, dtype)
        self.truth.double()
        self.ours = ours

    def copy_parameters(self) -> None:
        """Let ours and the peer have the parameters of the truth."""
        for model in (self.ours, self.peer):
            others = dict(model.named_parameters())
            with torch.no_grad():
                for name, p in self.truth.named_parameters():
                    others[name].copy_(p)

    def step(self, tokens: Any) -> dict[str, tuple[float, dict[str, Any]]]:
        """The loss and the gradients of each model, with the routing of the truth."""
        found, routing = {}, []
        for name in ("truth", "ours", "peer"):
            model = getattr(self, name)
            model.zero_grad()
            with replayed_routing(routing, record=name == "truth"):
                loss = loss_of(model, tokens)
            loss.backward()
            gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
            found[name] = (loss.item(), gradients)
        return found


def kinds_of(names: Any) -> dict[str, list[str]]:
    """Parameters by what they are, over the layers: a single one may be exact in bfloat16 by chance."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(name)
    return kinds


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_step_by_step(family: str, tmp_path: Path) -> None:
    trio = Trio(family, tmp_path)
    optimizer = torch.optim.AdamW(trio.truth.parameters(), lr=1e-2)
    for step in range(STEPS):
        trio.copy_parameters()
        found = trio.step(drawn_tokens(step))
        (_, wanted), (_, ours), (_, peer) = (found[name] for name in ("truth", "ours", "peer"))
        assert wanted.keys() == ours.keys()
        assert sum("lora" in name for name in ours) == 6 * len(blocks_of(trio.ours))
        for kind, names in kinds_of(wanted).items():
            error, bound = (
                sum((gradients[name] - wanted[name]).square().sum() for name in names).sqrt()
                for gradients in (ours, peer)
            )
            assert error <= 2 * bound, f"step {step}: {kind}: {error:.3g}, of the peer {bound:.3g}"
        optimizer.step()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_curves_side_by_side(family: str, tmp_path: Path) -> None:
    trio, curves = Trio(family, tmp_path), {}
    tokens = drawn_tokens(0)
    for name in ("truth", "ours", "peer"):
        model = getattr(trio, name)
        optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora" in n], lr=2e-2)
        curves[name] = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            curves[name].append(loss.item())
    ours, truth, peer = (torch.tensor(curves[name]) for name in ("ours", "truth", "peer"))
    assert ours[-1] < ours[0] - 0.05
    assert (ours - truth).norm() <= 2 * (peer - truth).norm() + 1e-3 * truth.norm()
