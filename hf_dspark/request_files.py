"""A run from one jsonl file to another: each process appends to a part of its own, the first one merges them in order.

What the parts hold when a run is started again, also with another number of processes, is not done again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[Any]:
    """The objects of a jsonl file, blank lines left out; a line that is not JSON is there as text."""
    with path.open(encoding="utf-8") as lines:  # str.splitlines would also split at separators inside of a prompt
        return [_parsed(line, otherwise=line.strip()) for line in lines if line.strip()]


class ResultFile:
    """The output of one run, in parts while it lasts. `options` are what its results depend on."""

    def __init__(self, path: Path, input_path: Path, options: dict[str, Any]):
        self.path = path
        content = json.dumps(options, sort_keys=True).encode() + input_path.read_bytes()
        self._run = hashlib.sha256(content).hexdigest()[:12]

    def start(self, num_rows: int) -> set[int]:
        """Indices of the rows that earlier tries have done.

        Raises ValueError where the output is there, or parts that do not belong to this run.
        """
        parts = self._parts()
        foreign = [part.name for part in parts if not part.name.endswith(self._run)]
        if foreign:
            raise ValueError(
                f"There are parts of a run with another input or other options in {self.path.parent}: "
                f"{', '.join(foreign)}. Start that run again, delete them, or name another output."
            )
        if not self.path.exists():
            return set(self._read_parts())
        if not parts:
            raise ValueError(f"{self.path} is there already. Delete it, or name another output.")
        return set(range(num_rows))  # a kill left the parts beside what they were merged to

    @contextmanager
    def part(self, rank: int, world: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A function that appends one row, which has an `index`, to the part of process `rank` of `world`."""
        part = self.path.with_name(f"{self.path.name}.part-{rank}-of-{world}-{self._run}")
        with part.open("a", encoding="utf-8") as out:

            def write(row: dict[str, Any]) -> None:
                # The line break comes first: what a kill has cut off ends there, and is no JSON.
                out.write("\n" + json.dumps(row))
                out.flush()

            yield write

    def merge(self, num_rows: int) -> list[dict[str, Any]]:
        """Write the output in order, then remove the parts; its rows. Raises ValueError where a row is missing."""
        if not self.path.exists():
            self._write(self._read_parts(), num_rows)
        for part in self._parts():
            part.unlink()
        return read_rows(self.path)

    def _write(self, rows: dict[int, dict[str, Any]], num_rows: int) -> None:
        missing = [index for index in range(num_rows) if index not in rows]
        if missing:
            raise ValueError(
                f"{len(missing)} of {num_rows} rows are not in the parts of {self.path} (the first: {missing[0]}): a "
                "process has ended early, or writes to another disk. Start the run again."
            )
        unfinished = self.path.with_name(f"{self.path.name}.merged-{self._run}")
        with unfinished.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(rows[index]) + "\n" for index in range(num_rows))
        os.replace(unfinished, self.path)

    def _parts(self) -> list[Path]:
        prefix = f"{self.path.name}.part-"
        return sorted(part for part in self.path.parent.iterdir() if part.name.startswith(prefix))

    def _read_parts(self) -> dict[int, dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        for part in self._parts():
            with part.open(encoding="utf-8") as lines:
                found = (_parsed(line, otherwise=None) for line in lines if line.strip())
                rows |= {row["index"]: row for row in found if row is not None}
        return rows


def _parsed(line: str, *, otherwise: Any) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return otherwise
