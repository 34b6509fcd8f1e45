"""Input sets that the user did not ask for, and what becomes of them where they are past a limit.

The inputs that a user gives, and sizes that a user names, have to be compared: past a limit they are an error. What
verification makes up besides is optional. It is left out where it would take too much memory or time, which is told,
and all of it together gets half of the time that one run may take.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from xform import limits
from xform.errors import LimitError
from xform.pipeline.random_inputs import InputCase

PAST_LIMIT = "past a limit"
_SHARE = 0.5  # of the limit "seconds" for one run, for all optional sets of the reference together


@dataclass
class OptionalSets:
    """Which sets are optional, and which of them were left out.

    Args:
        model: The captured model, whose weights earn time.

    Attributes:
        out_of_time: Whether a run took as long as the limit "seconds" allows: no more optional ones are begun.
    """

    model: ir.Model
    out_of_time: bool = False
    _asked: dict[int, InputCase] = field(default_factory=dict)  # by id
    _dropped: dict[int, InputCase] = field(default_factory=dict)  # by id
    _left_out: dict[str, str] = field(default_factory=dict)
    _spent: float = 0.0  # seconds

    def ask(self, case: InputCase) -> None:
        """The user asked for this set, though not for its values."""
        self._asked[id(case)] = case

    def holds(self, case: InputCase) -> bool:
        """Whether the user did not ask for a set: neither gave it, nor sizes for it."""
        return case.source != "given" and id(case) not in self._asked

    def dropped(self, case: InputCase) -> bool:
        """Whether a set is out, though the reference took it."""
        return id(case) in self._dropped

    def drop(self, case: InputCase, why: str) -> None:
        """Leave a set out of all that follows."""
        self._left_out.setdefault(str(case), why)
        self._dropped[id(case)] = case

    def past(self, case: InputCase, error: LimitError) -> None:
        """Drop a set that is past a limit. Where one takes too long, no more of them are run."""
        self.drop(case, error.what)
        self.slow(error)

    def slow(self, error: LimitError) -> None:
        """Begin no more optional runs if it was time that ran out."""
        self.out_of_time = self.out_of_time or error.limit == "seconds"

    def attempt(self, case: InputCase, take: Callable[[InputCase], str]) -> str:
        """Take an optional set.

        Args:
            take: Takes it, or says why the reference refuses it.

        Returns:
            What `take` says, or PAST_LIMIT where the set was left out.
        """
        if self._spent > _SHARE * limits.allowed("seconds", _bytes_of(self.model)):
            self._left_out[str(case)] = f"the optional sets before it took {self._spent:.0f} s"
        elif self.out_of_time:
            self._left_out[str(case)] = "a set before it is past the limit 'seconds'"
        else:
            start = time.monotonic()
            try:
                return take(case)
            except LimitError as error:
                self.past(case, error)
            finally:
                self._spent += time.monotonic() - start
        return PAST_LIMIT

    @property
    def any_left_out(self) -> bool:
        """Whether some set was left out."""
        return bool(self._left_out)

    def told(self) -> tuple[str, ...]:
        """A note on what was left out; none where nothing was."""
        if not self._left_out:
            return ()
        case, why = next(iter(self._left_out.items()))
        more = len(self._left_out) - 1
        return (f"{case} was left out{f', and {more} more' if more else ''}, as that is past a limit: {why}",)


def _bytes_of(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
