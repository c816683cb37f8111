"""
[`tile_ops`] as Triton kernels, which read a tile once: one program for each row, or for each pair and its mixture.

A program holds its lines in registers, so a tile has at most a few thousand columns.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _values(ptr, offsets, in_tile, scale):
    return tl.load(ptr + offsets, mask=in_tile, other=0.0).to(tl.float32) * scale


@triton.jit
def _soft_capped(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """The value and the slope of the soft-cap."""
    slope = z * 0 + 1
    if HAS_SOFTCAP:
        tanh = 2 * tl.sigmoid(2 * z / softcap) - 1
        slope = 1 - tanh * tanh
        z = softcap * tanh
    return z, slope


@triton.jit
def _fold_line(
    z,
    ptr,
    offsets,
    in_tile,
    state,
    num_states,
    labels,
    num_labels,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WITH_SLOPE: tl.constexpr,
    IS_MIXED: tl.constexpr,
):
    """Fold one line into its softmax; the pointers are those of the line."""
    z, slope = _soft_capped(z, softcap, HAS_SOFTCAP)
    z = tl.where(in_tile, z, float("-inf"))
    largest = tl.load(state)
    new_largest = tl.maximum(largest, tl.max(z, axis=0))
    rescale = tl.exp(largest - new_largest)
    label = tl.load(labels)
    is_label = (offsets == label) & in_tile
    e = tl.where(is_label, 0.0, tl.exp(z - new_largest))
    here = tl.sum(is_label.to(tl.int32), axis=0) > 0
    tl.store(state + 5 * num_states, tl.sum(tl.where(is_label, z, 0.0), axis=0), mask=here)
    if IS_MIXED:
        is_second = (offsets == tl.load(labels + num_labels)) & in_tile
        e = tl.where(is_second, 0.0, e)
        here = tl.sum(is_second.to(tl.int32), axis=0) > 0
        tl.store(state + 6 * num_states, tl.sum(tl.where(is_second, z, 0.0), axis=0), mask=here)
    else:
        before = tl.max(tl.where(offsets < label, z, float("-inf")), axis=0)
        tl.store(state + 3 * num_states, tl.maximum(tl.load(state + 3 * num_states), before))
        products = tl.sum(e * tl.where(in_tile, z, 0.0), axis=0)
        tl.store(state + 2 * num_states, tl.load(state + 2 * num_states) * rescale + products)
    tl.store(state, new_largest)
    tl.store(state + num_states, tl.load(state + num_states) * rescale + tl.sum(e, axis=0))
    tl.store(state + 4 * num_states, rescale)
    if WITH_SLOPE:
        e = e * slope
    tl.store(ptr + offsets, e.to(ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def _fold_kernel(
    tile,
    state,
    num_states,
    labels,
    num_labels,
    mix_weights,
    num_pairs,
    num_columns,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WITH_SLOPE: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    in_tile = offsets < num_columns
    ptr = tile + line * num_columns
    z = _values(ptr, offsets, in_tile, scale)
    state, labels = state + line, labels + line
    if PAIRED:
        second_ptr, mixed_ptr = ptr + num_pairs * num_columns, ptr + 2 * num_pairs * num_columns
        second = _values(second_ptr, offsets, in_tile, scale)
        share = tl.load(mix_weights + line)
        mixed = share * z + (1 - share) * second
        _fold_line(
            second,
            second_ptr,
            offsets,
            in_tile,
            state + num_pairs,
            num_states,
            labels + num_pairs,
            num_labels,
            softcap,
            HAS_SOFTCAP,
            WITH_SLOPE,
            False,
        )
        _fold_line(
            mixed,
            mixed_ptr,
            offsets,
            in_tile,
            state + 2 * num_pairs,
            num_states,
            labels + 2 * num_pairs,
            num_labels,
            softcap,
            HAS_SOFTCAP,
            WITH_SLOPE,
            True,
        )
    _fold_line(
        z, ptr, offsets, in_tile, state, num_states, labels, num_labels, softcap, HAS_SOFTCAP, WITH_SLOPE, False
    )


@triton.jit
def _line_gradient(
    z,
    offsets,
    log_z,
    grad,
    labels,
    num_labels,
    label_gradients,
    num_gradients,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    IS_MIXED: tl.constexpr,
):
    """The gradient on the head's output for one line; the pointers are those of the line."""
    z, slope = _soft_capped(z, softcap, HAS_SOFTCAP)
    grad = tl.load(grad)
    result = -grad * tl.exp(z - tl.load(log_z))
    result = tl.where(offsets == tl.load(labels), grad * tl.load(label_gradients), result)
    if IS_MIXED:
        is_second = offsets == tl.load(labels + num_labels)
        result = tl.where(is_second, grad * tl.load(label_gradients + num_gradients), result)
    return result * slope * scale


@triton.jit
def _gradient_kernel(
    tile,
    log_z,
    grad,
    labels,
    num_labels,
    label_gradients,
    num_gradients,
    mix_weights,
    num_pairs,
    num_columns,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    in_tile = offsets < num_columns
    ptr = tile + line * num_columns
    z = _values(ptr, offsets, in_tile, scale)
    log_z, grad, labels, label_gradients = log_z + line, grad + line, labels + line, label_gradients + line
    result = _line_gradient(
        z,
        offsets,
        log_z,
        grad,
        labels,
        num_labels,
        label_gradients,
        num_gradients,
        scale,
        softcap,
        HAS_SOFTCAP,
        False,
    )
    if PAIRED:
        second_ptr = ptr + num_pairs * num_columns
        second = _values(second_ptr, offsets, in_tile, scale)
        share = tl.load(mix_weights + line)
        second_result = _line_gradient(
            second,
            offsets,
            log_z + num_pairs,
            grad + num_pairs,
            labels + num_pairs,
            num_labels,
            label_gradients + num_pairs,
            num_gradients,
            scale,
            softcap,
            HAS_SOFTCAP,
            False,
        )
        mixed_result = _line_gradient(
            share * z + (1 - share) * second,
            offsets,
            log_z + 2 * num_pairs,
            grad + 2 * num_pairs,
            labels + 2 * num_pairs,
            num_labels,
            label_gradients + 2 * num_pairs,
            num_gradients,
            scale,
            softcap,
            HAS_SOFTCAP,
            True,
        )
        result += share * mixed_result
        second_result += (1 - share) * mixed_result
        tl.store(second_ptr + offsets, second_result.to(tile.dtype.element_ty), mask=in_tile)
    tl.store(ptr + offsets, result.to(tile.dtype.element_ty), mask=in_tile)


def fold(tile, state, labels, mix_weights, scale, softcap, with_slope, scratch=None) -> torch.Tensor:
    """As [`tile_ops.fold`], in place."""
    num_pairs, labels = len(mix_weights), labels.contiguous()
    _fold_kernel[(num_pairs or len(tile),)](
        tile,
        state,
        state.stride(0),
        labels,
        labels.stride(0),
        mix_weights,
        num_pairs,
        tile.size(1),
        **_options(scale, softcap, num_pairs, tile.size(1)),
        WITH_SLOPE=with_slope,
    )
    return tile


def to_gradient(tile, log_z, grad, labels, label_gradients, mix_weights, scale, softcap) -> torch.Tensor:
    """As [`tile_ops.to_gradient`], in place."""
    num_pairs, labels = len(mix_weights), labels.contiguous()
    _gradient_kernel[(num_pairs or len(tile),)](
        tile,
        log_z,
        grad,
        labels,
        labels.stride(0),
        label_gradients,
        label_gradients.stride(0),
        mix_weights,
        num_pairs,
        tile.size(1),
        **_options(scale, softcap, num_pairs, tile.size(1)),
    )
    return tile[: len(tile) - num_pairs]


def _options(scale, softcap, num_pairs, num_columns) -> dict:
    return {
        "scale": float(scale),
        "softcap": softcap or 1.0,
        "HAS_SOFTCAP": softcap is not None,
        "PAIRED": num_pairs > 0,
        "BLOCK": triton.next_power_of_2(num_columns),
        "num_warps": 16,
    }
