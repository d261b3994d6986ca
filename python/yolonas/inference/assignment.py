"""Linear assignment: rows and columns paired at the least total cost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def assign(cost: npt.NDArray[np.float64], limit: float) -> tuple[Indices, Indices]:
    """Pairs of rows and columns, each in one pair at most, such that the sum of (cost - limit) is least.

    cost: [n, m]; a pair that costs `limit` or more is never made. Returns the rows, ascending, and their columns.
    Exact, O(n^2 m) at worst: shortest augmenting paths with potentials (R. Jonker and A. Volgenant, 1987).
    """
    capped = np.minimum(np.asarray(cost, np.float64), limit) - limit  # at the limit a pair is as good as none
    # Rows and columns that nothing is in reach of would only make the paths longer.
    rows, columns = (np.flatnonzero((capped < 0).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return rows, columns
    reduced = capped[np.ix_(rows, columns)]
    if len(rows) <= len(columns):
        first, second = np.arange(len(rows)), _solve(reduced)
    else:
        first, second = _solve(reduced.T), np.arange(len(columns))
    made = reduced[first, second] < 0
    order = np.argsort(first[made])
    return rows[first[made][order]], columns[second[made][order]]


def _solve(cost: npt.NDArray[np.float64]) -> Indices:
    """The column of each row in the cheapest full assignment of a matrix [n, m], n <= m."""
    rows, columns = cost.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    row_of, column_of = np.full(columns, -1), np.full(rows, -1)
    for start in range(rows):
        # Dijkstra over reduced costs, from the row that has no column yet to the nearest column that has no row.
        distance, came_from = np.full(columns, np.inf), np.zeros(columns, np.int64)
        done = np.zeros(columns, bool)
        row, reached, column = start, 0.0, -1
        while row >= 0:
            step = reached + cost[row] - row_price[row] - column_price
            better = ~done & (step < distance)
            distance[better], came_from[better] = step[better], row
            column = int(np.argmin(np.where(done, np.inf, distance)))
            reached, row = float(distance[column]), int(row_of[column])
            done[column] = row >= 0
        # Prices that keep every reduced cost at 0 or above, and those of the assigned pairs at 0.
        passed = np.flatnonzero(done)
        row_price[start] += reached
        row_price[row_of[passed]] += reached - distance[passed]
        column_price[passed] -= reached - distance[passed]
        while column >= 0:  # turn the path around: each row takes the column that was reached from it
            row = int(came_from[column])
            row_of[column], column_of[row], column = row, column, int(column_of[row])
    return column_of
