"""Between ragged lists and padded tensors."""

import torch
from independent import Rows
from torch import Tensor


def padded(rows: Rows, fill: float = 0.0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)


def mask_of(rows: Rows) -> Tensor:
    return padded([[1.0] * len(row) for row in rows]).bool()


def assert_equals_rows(tensor: Tensor, rows: Rows) -> None:
    """Equal on real tokens, exactly zero on padding."""
    torch.testing.assert_close(tensor, padded(rows), rtol=1e-10, atol=1e-10)
    assert (tensor[~mask_of(rows)] == 0).all()
