"""The texts of a data set in one line, so that blocks can be moved from one to another."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from ..modeling.block_partition import document_starts, with_previous_blocks
from ..modeling.local_set import LocalSet


class Texts:
    """
    The texts of some batches in one line, one after the other without padding: `line` tensors have one entry for each
    token, and positions count along it.
    """

    def __init__(self, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        documents = [
            document_starts(*inputs["input_ids"].shape, inputs.get("attention_mask"), inputs.get("position_ids")).cpu()
            for inputs in batches
        ]
        self._is_token = [rows >= 0 for rows in documents]
        columns = [torch.arange(rows.shape[1]).expand_as(rows) for rows in documents]
        columns = torch.cat([rows[is_token] for rows, is_token in zip(columns, self._is_token, strict=True)])
        self._counts = [int(is_token.sum()) for is_token in self._is_token]
        #: Every token's own position.
        self.place = torch.arange(len(columns))
        self._shift = columns - self.place
        #: The first position of every token's text.
        self.first = self.line(documents)
        self._firsts = self.place[self.first == self.place]

    @property
    def number(self) -> int:
        """How many texts there are."""
        return len(self._firsts)

    def line(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """The line of positions of each batch's rows, `(batch_size, length)` each."""
        entries = [each[is_token] for each, is_token in zip(rows, self._is_token, strict=True)]
        return torch.cat(entries) - self._shift

    def line_of_lists(self, name: str, lists: Sequence[Sequence[bool]]) -> torch.Tensor:
        """A line of truth values, given for each sequence of the data set; padding that stands in it too."""
        batches, entries = iter(lists), []
        num_rows = sum(len(each) for each in self._is_token)
        if len(lists) != num_rows:
            raise ValueError(f"`{name}` has {len(lists)} entries; the data set has {num_rows} sequences.")
        for is_token in self._is_token:
            for row in is_token:
                marks = torch.as_tensor(next(batches), dtype=torch.bool)
                if len(marks) > len(row) or row[len(marks) :].any():
                    raise ValueError(f"`{name}` holds {len(marks)} values for a sequence of another length.")
                entries.append(marks[row[: len(marks)]])
        return torch.cat(entries)

    def rows(self, line: torch.Tensor, index: int, padding: int | bool = -1) -> torch.Tensor:
        """The rows of one batch, `(batch_size, length)`, of a line of positions or truth values."""
        before = sum(self._counts[:index])
        part = slice(before, before + self._counts[index])
        is_token = self._is_token[index]
        rows = torch.full(is_token.shape, padding, dtype=line.dtype)
        rows[is_token] = line[part] if line.dtype == torch.bool else line[part] + self._shift[part]
        return rows

    def apart(self, line: torch.Tensor, padding: int | bool = -1) -> torch.Tensor:
        """A row for each text: `(num_texts, length of the longest)`."""
        return pad_sequence(line.tensor_split(self._firsts[1:]), batch_first=True, padding_value=padding)

    def of_next_text(self, starts: torch.Tensor) -> torch.Tensor:
        """The blocks of the text that follows each, and of those after it where that one is shorter."""
        end = len(starts)
        firsts = torch.cat((self._firsts[1:], torch.tensor([end])))[(self.first == self.place).cumsum(0) - 1]
        twice = torch.cat((starts, starts + end))
        return twice[firsts + self.place - self.first] - firsts + self.first

    def windows(self, length: int) -> torch.Tensor:
        return self.place - (self.place - self.first) % length

    def recent(self, length: int) -> torch.Tensor:
        """The first of the last `length` tokens, of the same text, at each position."""
        return torch.maximum(self.first, self.place - length + 1)

    def local_set(self, starts: torch.Tensor, num_sinks: int, window: int | None) -> LocalSet:
        """What is local to each position from which the line of local starts goes back to these."""
        length = len(starts)
        return LocalSet(starts[None], self.first[None], length, length, num_sinks, window)

    def with_previous(self, starts: torch.Tensor, number: int) -> torch.Tensor:
        """Where the local set of each position begins that has these block starts."""
        return with_previous_blocks(starts[None], self.first[None], number).local_starts[0]
