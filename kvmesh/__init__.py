"""The face of kvmesh: the Python client and the command line.

`Client` and `AsyncClient` talk to a mesh's public gRPC port; the rest is behind `kvmesh --help`.
"""

from kvmesh.answer import (
    Delta,
    FinishReason,
    LogprobEntry,
    PromptInfo,
    Result,
    SequenceResult,
    TokenLogprobs,
    Usage,
)
from kvmesh.client import AsyncClient, Client
from kvmesh.generation import AsyncGeneration, Generation
from mesh.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    KvmeshError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)

__all__ = [
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "AsyncGeneration",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Delta",
    "FailedPrecondition",
    "FieldViolation",
    "FinishReason",
    "Generation",
    "Internal",
    "InvalidArgument",
    "KvmeshError",
    "LogprobEntry",
    "NotFound",
    "PromptInfo",
    "ResourceExhausted",
    "Result",
    "SequenceResult",
    "TokenLogprobs",
    "Unavailable",
    "Usage",
]
