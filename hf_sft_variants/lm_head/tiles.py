"""Cuts logits into tiles that stay in the cache."""

from collections.abc import Iterator
from typing import NamedTuple

import torch


# Largest size of a tile. On a CPU, the tile and its exponentials share the cache with a chunk of the weight; on an
# accelerator, each program of the kernels holds a row of the tile in registers.
CPU_ROWS, CPU_COLUMNS = 512, 2048
ACCELERATOR_ROWS, ACCELERATOR_COLUMNS = 4096, 4096


class Tile(NamedTuple):
    """
    Rows that go through the head together.

    Attributes:
        rows (`slice`):
            Of the hidden states, in tile order. Of `n` pairs, the first `n` rows are mixed with the next `n`.
        pairs (`slice`):
            Of the pairs; empty in a tile of single rows.
        queries (`slice`):
            Its softmaxes: first those of the rows, then those of the mixtures.
    """

    rows: slice
    pairs: slice
    queries: slice


class TilePlan(NamedTuple):
    """
    How logits are cut into tiles and what follows the product with the weight.

    Attributes:
        tiles (`list[Tile]`):
            Those with pairs first.
        chunks (`list[slice]`):
            The vocabulary in parts, the largest first.
        softcap (`float`, *optional*):
            The logits are `softcap * tanh(values / softcap)` of the scaled values.
        scale (`float`):
            Factor of the head's output.
        product_dtype (`torch.dtype`):
            Of the matrix products. Sums are in float32, or in float64 if the products are.
    """

    tiles: list[Tile]
    chunks: list[slice]
    softcap: float | None
    scale: float
    product_dtype: torch.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.product_dtype, torch.float32)

    def new_tile(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the largest tile; see [`view`]."""
        num_queries = max((size(tile.queries) for tile in self.tiles), default=0)
        return like.new_empty(num_queries * size(self.chunks[0]), dtype=dtype)


class Projection(NamedTuple):
    """A tile's product with a chunk of the weight, in memory that the next one takes over."""

    tile: Tile
    chunk: slice
    hidden: torch.Tensor
    weight: torch.Tensor
    values: torch.Tensor  # a line for each query; those of the mixtures are not written yet


def make_tiles(num_rows: int, num_pairs: int, tile_rows: int) -> list[Tile]:
    """Tiles of pairs, then tiles of single rows."""
    tiles, query = [], 0
    for pairs in slices(0, num_pairs, max(tile_rows // 2, 1)):
        stop = query + 3 * size(pairs)
        tiles.append(Tile(slice(2 * pairs.start, 2 * pairs.stop), pairs, slice(query, stop)))
        query = stop
    for rows in slices(2 * num_pairs, num_rows, tile_rows):
        tiles.append(Tile(rows, slice(0, 0), slice(query, query + size(rows))))
        query += size(rows)
    return tiles


def tile_shape(vocab_size: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile."""
    is_cpu = device.type == "cpu"
    rows, columns = (CPU_ROWS, CPU_COLUMNS) if is_cpu else (ACCELERATOR_ROWS, ACCELERATOR_COLUMNS)
    return rows, min(columns, max(vocab_size, 1))


def project(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    plan: TilePlan,
    kept: torch.Tensor | None = None,
) -> Iterator[Projection]:
    """Yield each tile's product with each chunk of the weight, read from `kept` if an earlier call kept them."""
    memory = plan.new_tile(hidden, plan.product_dtype)
    hidden = hidden.to(plan.product_dtype)
    for chunk in plan.chunks:  # the outer loop, so that a chunk of the weight and its gradient stay in the cache
        chunk_weight = weight[chunk].to(plan.product_dtype)
        chunk_bias = None if bias is None else bias[chunk].to(plan.product_dtype)
        for tile in plan.tiles:
            values = view(memory, size(tile.queries), size(chunk))
            product = values[: size(tile.rows)]
            if kept is not None:
                product.copy_(kept[tile.rows, chunk])
            else:
                torch.mm(hidden[tile.rows], chunk_weight.t(), out=product)
                if chunk_bias is not None:
                    product.add_(chunk_bias)
            yield Projection(tile, chunk, hidden[tile.rows], chunk_weight, values)


def add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a product to float32 sums, without rounding it to the dtype of its factors first."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, stop)) for begin in range(start, stop, step)]


def size(part: slice) -> int:
    return part.stop - part.start


def view(memory: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    return memory[: num_rows * num_columns].view(num_rows, num_columns)
