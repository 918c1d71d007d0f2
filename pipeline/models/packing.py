"""Samples of different lengths laid end to end in rows, so that forwards spend next to nothing on padding."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WASTE = 0.03  # share of padding that longer rows are tried to get below
WIDTHS_ON_CUDA = 16  # rows are a multiple of this wide: fewer shapes to choose kernels for, and aligned masks
WIDEST = 8  # rows are at most this many times the longest sample: attention's cost grows with the width


@dataclass(frozen=True)
class Layout:
    """How a model may be read; `models/forward.py` finds out."""

    end_to_end: bool  # it keeps samples in one row apart
    longest_by_mask: int  # samples up to this length may be told apart by a mask, longer ones by their positions only
    plain_head: bool  # its logits are its head's output on the trunk's; some models scale or cap them


class Packed(NamedTuple):  # not a dataclass: engines look for the tensors in it
    """n samples as the model reads them; T counts response tokens. The last of each sample is predicted, not read."""

    tokens: Tensor  # (rows, width)
    positions: Tensor  # (rows, width) from 0 in each sample
    attention: Tensor | None  # (rows, 1, width, width) or (rows, width) bool; None: the model sees it by the positions
    read: Tensor  # (T,) where, in rows * width, the position before each response token is
    targets: Tensor  # (T,) the response tokens, sample by sample
    slots: Tensor  # (T,) where, in n * R, each of them belongs
    shape: tuple[int, int]  # (n, R)

    def unpack(self, values: Tensor) -> Tensor:
        """Put values (T,) where their tokens are in the padded responses: (n, R), zero on padding."""
        padded = values.new_zeros(self.shape)
        padded.view(-1)[self.slots] = values
        return padded

    def take(self, padded: Tensor) -> Tensor:
        """The values (T,) of the response tokens from a padded tensor (n, R)."""
        return padded.reshape(-1)[self.slots]


def assign_rows(lengths: Sequence[int]) -> tuple[list[list[int]], int]:
    """Share samples out over rows of one width; returns each row's samples and the width.

    As many rows, and so as narrow ones, as go with little waste; each sample goes, longest first, where there is least.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    total, longest = sum(lengths), max(1, max(lengths))
    best: tuple[int, list[list[int]], int] | None = None  # positions, rows, width
    for count in range(max(1, total // longest), max(0, total // (longest * WIDEST) - 1), -1):
        rows, loads = [[] for _ in range(count)], [(0, row) for row in range(count)]
        for i in order:
            load, row = loads[0]
            rows[row].append(i)
            heapq.heapreplace(loads, (load + lengths[i], row))
        width = max(load for load, _ in loads)
        if best is None or count * width < best[0]:
            best = (count * width, rows, width)
        if best[0] * (1 - WASTE) <= total:
            break
    return best[1], best[2]


def pack(
    tokens: Tensor, lengths: np.ndarray, response_width: int, layout: Layout, *, multiple: int | None = None
) -> Packed:
    """Lay samples out for one forward; what is planned is planned on the host, from lengths it knows.

    Args:
        tokens: (n, P + R): left-padded prompts followed by right-padded responses.
        lengths: (n, 2) tokens of each prompt and each response.
        response_width: R.
        layout: how the model may be read.
        multiple: of which the rows' width is to be one, where they hold several samples; by default 1 on a CPU.
    """
    if multiple is None:
        multiple = WIDTHS_ON_CUDA if tokens.device.type == "cuda" else 1
    count, total = tokens.shape
    prompts, responses = lengths.T
    lengths = np.where(responses > 0, prompts + responses - 1, 0)
    longest = max(1, int(lengths.max()))
    if layout.end_to_end:
        rows, width = assign_rows(lengths.tolist())
        width = -(-max(1, width) // multiple) * multiple
    else:  # a wider row could be more than the model's context
        rows, width = [[i] for i in range(count)], longest
    source = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros_like(source)
    segments = np.zeros_like(source)
    starts = np.zeros(count, dtype=np.int64)  # of each sample, in rows * width
    for row, samples in enumerate(rows):
        at = 0
        for number, i in enumerate(samples, 1):
            end = at + lengths[i]
            first = i * total + total - response_width - prompts[i]
            source[row, at:end] = np.arange(first, first + lengths[i])
            positions[row, at:end] = np.arange(lengths[i])
            segments[row, at:end] = number
            starts[i] = row * width + at
            at = end
        positions[row, at:] = np.arange(width - at) % longest  # padding is samples of its own
    read = np.concatenate([starts[i] + prompts[i] - 1 + np.arange(responses[i]) for i in range(count)])
    slots = np.concatenate([i * response_width + np.arange(responses[i]) for i in range(count)])
    sizes = [source.size, positions.size, read.size, slots.size]
    moved = torch.from_numpy(np.concatenate([source.ravel(), positions.ravel(), segments.ravel(), read, slots]))
    if tokens.device.type == "cuda":
        moved = moved.pin_memory()
    moved = moved.to(tokens.device, non_blocking=True)  # in one piece
    source, positions, segments, read, slots = moved.split([sizes[0], sizes[1], sizes[1], sizes[2], sizes[3]])
    positions, segments = positions.view(-1, width), segments.view(-1, width)
    attention = None
    if not layout.end_to_end:
        attention = segments > 0
    elif longest <= layout.longest_by_mask:
        causal = torch.ones(width, width, dtype=torch.bool, device=tokens.device).tril()
        attention = ((segments.unsqueeze(2) == segments.unsqueeze(1)) & causal).unsqueeze(1)
    flat = tokens.reshape(-1)
    targets = tokens[:, -response_width:].reshape(-1)[slots]
    return Packed(flat[source].view(-1, width), positions, attention, read, targets, slots, (count, response_width))
