"""One folder per operation family; importing this package registers `torch.ops.peftkern.*` and builds nothing."""

from peftkern.ops import gram_schmidt, householder

__all__ = ["gram_schmidt", "householder"]
