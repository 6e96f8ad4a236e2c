"""Bias, penalties, masks and log-probabilities on the device, for steps that are judged there before the host has seen them.

How often each token occurred is counted where the tokens are: ``counts`` has a row for every running request with penalties. The host
fills it with what it knows when the request joins, or after steps that the host judged, and every judged step adds what it committed. So
a step that is launched before its turn finds the counts of the step before it.

What the steps of one composition have in common is sent once (``send``); rows of logits are edited into a buffer of their own, because
log-probabilities are those of the raw logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels.edit_logits import EditRows, Edits, count_tokens, edit_logits
from dspark.kernels.host_copy import HostCopy
from dspark.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from dspark.types import TokenLogprob
from dspark.workers.verifier.edits import LogitEdits

EDIT_ROWS = 512  # rows of logits that one step may edit
SCORE_ROWS = 128  # rows that are scored at once: bounds the memory that it takes
MAX_EOS_IDS = 64  # of a model, beside the request's own
HOST_COPIES = 3
SCORE_COLUMNS = 2 + 2 * MAX_LOGPROBS


class DeviceEdits:
    """Of at most ``max_rows`` requests over ``vocab_size`` ids, whose drafts are ``drafts`` [max_rows, n]."""

    def __init__(self, max_rows: int, vocab_size: int, drafts: Tensor) -> None:
        device = drafts.device
        self._drafts, self._device = drafts, device
        self._edited = torch.zeros(EDIT_ROWS, vocab_size, dtype=torch.float32, device=device)
        self._counts = torch.zeros(max_rows, vocab_size, dtype=torch.int32, device=device)
        self._top = min(MAX_LOGPROBS, vocab_size)
        self._scores = torch.zeros(EDIT_ROWS, SCORE_COLUMNS, dtype=torch.float64, device=device)
        self._hosts = [torch.zeros_like(self._scores, device="cpu", pin_memory=device.type == "cuda") for _ in range(HOST_COPIES)]
        self._turn = 0
        int32, float32 = torch.int32, torch.float32
        sizes = {
            "requests": (int32, EDIT_ROWS),
            "depths": (int32, EDIT_ROWS),
            "places": (int32, max_rows),
            "repetition": (float32, max_rows),
            "presence": (float32, max_rows),
            "frequency": (float32, max_rows),
            "bias_starts": (int32, max_rows + 1),
            "bias_ids": (int32, max_rows * MAX_LOGIT_BIAS),
            "bias_values": (float32, max_rows * MAX_LOGIT_BIAS),
            "stop_starts": (int32, max_rows + 1),
            "stop_ids": (int32, max_rows * (MAX_STOP_TOKEN_IDS + MAX_EOS_IDS)),
            "stops_from": (torch.int64, max_rows),
        }
        self._fields = {name: torch.zeros(size, dtype=dtype, device=device) for name, (dtype, size) in sizes.items()}
        self.positions = torch.zeros(EDIT_ROWS, dtype=torch.int64, device=device)  # that the rows of a step predict
        self._places: dict[str, int] = {}
        self._free = list(range(max_rows))
        self._counted: set[str] = set()  # requests whose counts are those of their last step
        self._sent_edits: tuple[LogitEdits | None, ...] | None = None

    @staticmethod
    def num_bytes(max_rows: int, vocab_size: int) -> int:
        """Memory of a device that it takes, graphs included."""
        return (EDIT_ROWS + max_rows + 3 * SCORE_ROWS) * vocab_size * 4

    def forget_counts(self) -> None:
        """The host judged a step: what it committed is not counted here."""
        self._counted.clear()

    def release(self, request_id: str) -> None:
        """A request ended."""
        if (place := self._places.pop(request_id, None)) is not None:
            self._free.append(place)
            self._counted.discard(request_id)

    def holds(self, edits: tuple[LogitEdits | None, ...]) -> bool:
        """Whether they are those that were sent last, and nothing was forgotten since."""
        return edits == self._sent_edits and all(one is None or not one.counts or one.request_id in self._counted for one in edits)

    def send(self, edits: Sequence[LogitEdits | None], lengths: NDArray[np.int64]) -> None:
        """Say what a step's requests do, in order, each of which has ``lengths`` [R] rows of logits."""
        self._sent_edits = tuple(edits)
        places = [-1 if one is None or not one.counts else self._place(one) for one in edits]
        sampled = [None if one is None else one.sampling for one in edits]
        rows = np.repeat(np.arange(len(edits)), lengths)
        depths = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        biases = [{} if one is None else one.logit_bias for one in sampled]
        stops = [() if one is None or not one.sampling.min_tokens else one.stop_ids for one in edits]
        first_free = [0 if one is None else one.num_prompt + one.sampling.min_tokens for one in edits]
        self._write("requests", np.concatenate([rows, np.full(EDIT_ROWS - len(rows), -1)]))
        self._write("depths", depths)
        self._write("places", np.array(places))
        self._write("repetition", np.array([1.0 if one is None else one.repetition_penalty for one in sampled]))
        self._write("presence", np.array([0.0 if one is None else one.presence_penalty for one in sampled]))
        self._write("frequency", np.array([0.0 if one is None else one.frequency_penalty for one in sampled]))
        self._write("bias_starts", np.cumsum([0, *map(len, biases)]))
        self._write("bias_ids", np.array([token for bias in biases for token in bias]))
        self._write("bias_values", np.array([value for bias in biases for value in bias.values()]))
        self._write("stop_starts", np.cumsum([0, *map(len, stops)]))
        self._write("stop_ids", np.array([token for ids in stops for token in ids]))
        self._write("stops_from", np.array(first_free))

    def edit(self, logits: Tensor, num_requests: int) -> Tensor:
        """The edited rows [N, V] fp32 of logits [N, V]. Part of a graph."""
        count = logits.shape[0]
        out, fields = self._edited[:count], self._fields
        rows = EditRows(fields["requests"][:count], fields["depths"][:count], self.positions[:count])
        edit_logits(logits, rows, self._edits(), self._drafts[:num_requests], self._counts, out)
        return out

    def count(self, tokens: Tensor, accepted: Tensor, judged: Tensor) -> None:
        """Count what the step committed. Part of a graph."""
        count_tokens(tokens, accepted, judged, self._fields["places"][: tokens.shape[0]], self._counts)

    def score(self, logits: Tensor, own: Tensor) -> None:
        """Leave log-probability and rank of the tokens ``own`` [N] under raw logits [N, V], and of the likeliest. Part of a graph."""
        values, best = logits.topk(self._top, dim=-1)
        for begin in range(0, logits.shape[0], SCORE_ROWS):
            part = slice(begin, begin + SCORE_ROWS)
            rows = logits[part].to(torch.float32)
            chosen = rows.gather(1, own[part].clamp(min=0).unsqueeze(1))
            total = rows.logsumexp(-1, keepdim=True)
            ranks = (rows > chosen).sum(-1, keepdim=True) + 1
            found = (chosen - total, ranks, best[part], values[part].to(torch.float32) - total)
            self._scores[begin : begin + len(rows), : 2 + 2 * self._top].copy_(torch.cat([one.to(torch.float64) for one in found], dim=1))

    def sent_scores(self, count: int) -> Scores:
        """The scores of the first ``count`` rows, on their way to the host; at most three are under way at once."""
        self._turn = (self._turn + 1) % HOST_COPIES
        return Scores(self._scores[:count], self._hosts[self._turn], self._top)

    def _edits(self) -> Edits:
        fields = self._fields
        return Edits(
            places=fields["places"],
            repetition=fields["repetition"],
            presence=fields["presence"],
            frequency=fields["frequency"],
            bias_starts=fields["bias_starts"],
            bias_ids=fields["bias_ids"],
            bias_values=fields["bias_values"],
            stop_starts=fields["stop_starts"],
            stop_ids=fields["stop_ids"],
            stops_from=fields["stops_from"],
        )

    def _place(self, edits: LogitEdits) -> int:
        """The row of the request's counts, which hold all that the host knows or what steps have counted since."""
        name = edits.request_id
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = self._free.pop()
        if name not in self._counted:
            self._counted.add(name)
            counts = self._counts[place]
            counts.zero_()
            if edits.num_prompt and edits.sampling.repetition_penalty != 1.0:
                counts.index_fill_(0, self._sent(np.unique(edits.tokens[: edits.num_prompt])), 1)
            output = self._sent(np.array(edits.tokens[edits.num_prompt :], dtype=np.int64))
            counts.scatter_add_(0, output, torch.full_like(output, 2, dtype=torch.int32))
        return place

    def _write(self, name: str, values: NDArray[np.generic]) -> None:
        field = self._fields[name]
        if len(values):
            field[: len(values)].copy_(self._sent(values.astype(numpy_type(field))))

    def _sent(self, values: NDArray[np.generic]) -> Tensor:
        """Numbers on the device, without waiting for it."""
        host = torch.from_numpy(np.ascontiguousarray(values))
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host


class Scores:
    """Log-probabilities of a step's rows on their way to the host."""

    def __init__(self, scores: Tensor, host: Tensor, top: int) -> None:
        self._top = top
        self._copy = HostCopy(scores, host)
        self._read: tuple[list[list[float]], NDArray[np.int64], NDArray[np.float64]] | None = None

    def of(self, row: int, token: int, top: int) -> TokenLogprob:
        """What row ``row`` says of the token that was taken there, with ``top`` alternatives; waits for it."""
        if self._read is None:
            self._read = self._wait()
        own, ids, values = self._read
        logprob, rank = own[row]
        best = tuple(zip(ids[row, :top].tolist(), values[row, :top].tolist(), strict=True)) if top else ()
        return TokenLogprob(token, logprob, int(rank), best)

    def _wait(self) -> tuple[list[list[float]], NDArray[np.int64], NDArray[np.float64]]:
        """Log-probability and rank of each row's token; ids and values of the likeliest, equal ones by id."""
        numbers: NDArray[np.float64] = self._copy.read().numpy()
        ids, values = numbers[:, 2 : 2 + self._top].astype(np.int64), numbers[:, 2 + self._top : 2 + 2 * self._top]
        order = np.lexsort((ids, -values), axis=-1)
        return numbers[:, :2].tolist(), np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)


def numpy_type(field: Tensor) -> np.dtype[np.generic]:
    """How numpy calls a field's dtype."""
    return torch.empty(0, dtype=field.dtype).numpy().dtype
