"""Matrices with their scalar factors multiplied in."""

from __future__ import annotations

from collections.abc import Callable

from dynamo_lightning.rewards.maths.nodes import Matrix, Negative, Node, Product, Quotient


def as_matrix(node: Node) -> Matrix | None:
    """Return a matrix, or a scalar multiple of one as a matrix; None of anything else."""
    if isinstance(node, Matrix):
        return node
    if isinstance(node, Negative):
        inner = as_matrix(node.operand)
        return None if inner is None else _map(inner, Negative)
    if isinstance(node, Quotient):
        inner = as_matrix(node.numerator)
        return None if inner is None else _map(inner, lambda cell: Quotient(cell, node.denominator))
    if isinstance(node, Product):
        found = [factor for factor in node.factors if isinstance(factor, Matrix)]
        if len(found) == 1:
            scalars = tuple(factor for factor in node.factors if factor is not found[0])
            return _map(found[0], lambda cell: Product((*scalars, cell)))
    return None


def _map(matrix: Matrix, function: Callable[[Node], Node]) -> Matrix:
    return Matrix(tuple(tuple(function(cell) for cell in row) for row in matrix.rows))
