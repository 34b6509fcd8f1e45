"""Branches that no usual input reaches, compared with their conditions replaced by constants in both graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import onnx_ir as ir

from xform.errors import LimitError
from xform.pipeline.branches import Branch, forced, in_words
from xform.pipeline.judge import Judge
from xform.pipeline.oracle import CouldNotRunError, Outputs
from xform.pipeline.random_inputs import InputCase
from xform.pipeline.reference import Execute, Reference
from xform.pipeline.tolerance import UserTolerance
from xform.pipeline.verdict import OutputError
from xform.rewrite.passes import Fidelity


@dataclass(frozen=True)
class Forced:
    """How forcing went.

    Attributes:
        done: How many branches that no input reached were compared.
        unreached: In words, those that could not be.
        wrong: Why a candidate has failed; empty if it has not.
        errors: Of the branch that is wrong.
    """

    done: int
    unreached: tuple[str, ...]
    wrong: str = ""
    errors: tuple[OutputError, ...] = ()


@dataclass
class ForcedBranches:
    """What the captured model gives where it always goes one way.

    Args:
        model: The captured model.
        seed: Of the nudging.

    Attributes:
        left: Branches that no input reaches; of the others that are forced, no usual input does.
    """

    model: ir.Model
    seed: int
    left: frozenset[Branch] = frozenset()
    _references: dict[Branch, list[tuple[InputCase, Outputs]]] = field(default_factory=dict)

    def force(self, branch: Branch, cases: Sequence[InputCase]) -> LimitError | None:
        """Run the captured model that way, on the sets that it then takes.

        Returns:
            The limit that it is past, if it is: the way that no input goes may be the long one.
        """
        found = self._references[branch] = []
        model = forced(self.model, branch)
        if model is None:
            return None
        try:
            with Reference(model, None) as runner:
                for case in cases:
                    with suppress(CouldNotRunError):  # shapes that only go the other way
                        found.append((case, runner.run(case.arrays)))
        except CouldNotRunError:
            found.clear()
        except LimitError as error:
            return error
        return None

    def compare(
        self,
        candidate: ir.Model,
        execute: Execute,
        serves: Callable[[InputCase], bool],
        tolerance: UserTolerance | None,
        fidelity: Fidelity,
        precision: Mapping[str, ir.DataType] | None,
    ) -> Forced:
        """Compare a candidate where it is forced to go the same ways.

        Args:
            execute: Runs it.
            serves: Whether a set is one to compare on.
            precision: The dtype that each output of the candidate is computed in.
        """
        unreached, done = [self._words(branch) for branch in self.left if branch not in self._references], 0
        for branch, pairs in self._references.items():
            model = forced(candidate, branch) if pairs else None
            chosen = [pair for pair in pairs if serves(pair[0])]
            if model is None or not chosen:
                unreached += [self._words(branch)] if branch in self.left else []
                continue
            try:
                results = execute(model, [case.arrays for case, _ in chosen])
            except LimitError:  # nobody asked for going this way
                unreached.append(self._words(branch))
                continue
            except CouldNotRunError as error:
                return Forced(done, (), f"{self._words(branch)} runs in the captured model only: {error.what}")
            judge = Judge(forced(self.model, branch) or self.model, tolerance, self.seed)
            for (case, expected), found in zip(chosen, results, strict=True):
                errors = judge.errors(case, expected, found, fidelity, precision)
                wrong = next((error for error in errors if not error.agrees and not error.noisy), None)
                if wrong is not None:
                    what = f"output {wrong.output!r} in {self._words(branch)} on {wrong.inputs}: {wrong.reason}"
                    return Forced(done, (), what, tuple(errors))
            done += branch in self.left
        return Forced(done, tuple(unreached))

    def _words(self, branch: Branch) -> str:
        return in_words(self.model, branch)
