"""Orthonormalised reflections in projector form: H = I - 2 Q Q^T = I - V T V^T with T = 2 (V^T V)^-1.

`peftkern.ops.householder.factor(u, gram_schmidt=True)` is the differentiable entry; derivation: README.md.
"""

from peftkern.ops.gram_schmidt import contract  # noqa: F401  (registers the operations)
