"""Orthonormalised reflections: H = I - 2 Q Q^T = I - Q T Q^T with Q an orthonormal basis of span(V), T = 2 (Q^T Q)^-1.

`peftkern.ops.householder.factor(u, gram_schmidt=True)` is the differentiable entry; derivation: README.md.
"""

from peftkern.ops.gram_schmidt import contract  # noqa: F401  (registers the operations)
