"""What an optimization did: as data, on the terminal, as HTML."""

from xform.report.concepts import CONCEPTS, count_concepts, count_op_types
from xform.report.environment import Environment
from xform.report.schema import (
    SCHEMA,
    LatencyReport,
    PassReport,
    Report,
    Size,
    VerificationReport,
    plain,
)

__all__ = [
    "CONCEPTS",
    "SCHEMA",
    "Environment",
    "LatencyReport",
    "PassReport",
    "Report",
    "Size",
    "VerificationReport",
    "count_concepts",
    "count_op_types",
    "plain",
]
