"""How checkpoints name and lay out the tensors of experts."""
