"""Reading a report that was written as JSON."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xform.errors import ModelError
from xform.report.schema import SCHEMA, Report


def read_report(path: Path) -> Report:
    """The report in a JSON file that `write_report` wrote.

    Raises:
        ModelError: The file is not such a report.
    """
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ModelError(f"not a report of the schema {SCHEMA}", where=str(path))
        report: Report = _build(Report, data)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"the report cannot be read: {error}", where=str(path)) from error
    return report


def _build(kind: Any, value: Any) -> Any:
    """`value`, made of what JSON knows, as a value of this type."""
    if value is None:
        return None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _build(next(one for one in arguments if one is not type(None)), value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = [field.name for field in dataclasses.fields(kind) if field.name in value]
        return typing.cast(Any, kind)(**{name: _build(hints[name], value[name]) for name in known})
    if origin is list:
        return [_build(arguments[0], element) for element in value]
    if origin is tuple:
        return tuple([_build(arguments[0], element) for element in value])
    if isinstance(value, Mapping) and origin is dict:
        return dict(value)
    return float(value) if kind is float else value
