"""Matrices of a larger network that computes what a smaller one does, filled with random values where nothing hangs on them.

A value has an effect only where its input is not zero and its output is read. So a widened matrix holds the source's values
at their places, zeros where a live input would reach an output that must stay zero, and noise everywhere else::

    live    inputs that may be other than zero
    loud    outputs that may be other than zero although the source has none there: whoever reads them multiplies by zero
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NOISE_STD = 0.02  # as models of this class are initialised


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a matrix: ``places[i]`` is where the source's index i goes among ``size``; ``open`` are live or loud."""

    places: Sequence[int]
    size: int
    open: Sequence[int] = ()


class Widener:
    """Makes widened tensors of one dtype on one device; the noise is the same for the same seed and device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        import torch

        self.dtype, self.device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def noise(self, *shape: int) -> Tensor:
        """Weights without effect."""
        import torch

        return torch.randn(*shape, generator=self._generator, dtype=self.dtype, device=self.device) * NOISE_STD

    def matrix(self, source: Tensor | None, outputs: Axis, inputs: Axis, gain: float = 1.0) -> Tensor:
        """[outputs, inputs] that holds ``gain * source`` (None: nothing); ``outputs.open`` are loud, ``inputs.open`` live."""
        import torch

        wide = self.noise(outputs.size, inputs.size)
        silent = torch.ones(outputs.size, dtype=torch.bool)
        silent[list(outputs.open)] = False
        rows = silent.nonzero().squeeze(1).to(self.device)
        live = torch.tensor(inputs.open, dtype=torch.int64, device=self.device)
        wide[rows.unsqueeze(1), live] = 0.0
        if source is not None:
            at = torch.tensor(outputs.places, device=self.device).unsqueeze(1), torch.tensor(inputs.places, device=self.device)
            wide[at] = self._placed(source, gain)
        return wide

    def vector(self, source: Tensor, axis: Axis, gain: float = 1.0, rest: float = 1.0) -> Tensor:
        """[size] that holds ``gain * source``, and ``rest`` elsewhere."""
        import torch

        wide = torch.full((axis.size,), rest, dtype=self.dtype, device=self.device)
        wide[torch.tensor(axis.places, device=self.device)] = self._placed(source, gain)
        return wide

    def kept(self, source: Tensor) -> Tensor:
        """A tensor that does not change its shape."""
        return self._placed(source, 1.0)

    def _placed(self, source: Tensor, gain: float) -> Tensor:
        import torch

        return (source.to(self.device, torch.float32) * gain).to(self.dtype)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a stack of Llama-class layers."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of a small layer lie in a large one."""

    small: Shape
    large: Shape

    @property
    def stream(self) -> Axis:
        """The residual stream as input: what the source does not have stays zero through all layers."""
        used = range(self.small.hidden)
        return Axis(used, self.large.hidden, used)

    @property
    def stream_out(self) -> Axis:
        """The residual stream as output."""
        return Axis(range(self.small.hidden), self.large.hidden)

    @property
    def dims(self) -> list[int]:
        """Places of a head's dimensions: rotary pair (i, i + D/2) becomes the pair of the same frequency."""
        ratio, half = self.large.head_dim // self.small.head_dim, self.small.head_dim // 2
        return [i // half * (self.large.head_dim // 2) + i % half * ratio for i in range(self.small.head_dim)]

    @property
    def queries(self) -> Axis:
        """Query heads; those of no source head may say anything, since what they attend with is read by nobody."""
        used = [h // self.small.group * self.large.group + h % self.small.group for h in range(self.small.heads)]
        return self._heads(used, self.large.heads, [h for h in range(self.large.heads) if h not in used])

    @property
    def keys(self) -> Axis:
        """KV heads; keys of those without a source head may be anything, since their values are zero."""
        return self._heads(range(self.small.kv_heads), self.large.kv_heads, range(self.small.kv_heads, self.large.kv_heads))

    @property
    def values(self) -> Axis:
        """KV heads whose unused dimensions are all zero."""
        return self._heads(range(self.small.kv_heads), self.large.kv_heads, ())

    @property
    def attended(self) -> Axis:
        """Attention's output: live wherever a head reads values that are not zero."""
        live = [h * self.large.head_dim + dim for h in range(self.small.kv_heads * self.large.group) for dim in self.dims]
        return Axis(self.queries.places, self.large.heads * self.large.head_dim, live)

    @property
    def gates(self) -> Axis:
        """MLP units before the product; gates without a source unit may be anything, since they multiply zero."""
        return Axis(range(self.small.intermediate), self.large.intermediate, range(self.small.intermediate, self.large.intermediate))

    @property
    def ups(self) -> Axis:
        """MLP units whose unused ones are zero."""
        return Axis(range(self.small.intermediate), self.large.intermediate)

    @property
    def units(self) -> Axis:
        """MLP units after the product."""
        return Axis(range(self.small.intermediate), self.large.intermediate, range(self.small.intermediate))

    def _heads(self, used: Sequence[int], count: int, loud: Sequence[int]) -> Axis:
        size = self.large.head_dim
        places = [head * size + dim for head in used for dim in self.dims]
        return Axis(places, count * size, [head * size + dim for head in loud for dim in range(size)])
