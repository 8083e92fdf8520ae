"""One folder per operation family; importing this package registers `torch.ops.peftkern.*` and builds nothing."""

from peftkern.ops import block_rotation, butterfly, gram_schmidt, householder

__all__ = ["block_rotation", "butterfly", "gram_schmidt", "householder"]
