"""Domain errors of the mesh and the one table between them and gRPC status.

Owns the mapping in both directions, with google.rpc.ErrorInfo and BadRequest details. Never logs a
client's mistake; an unknown exception is logged once, with its incident id.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "kvmesh.dev"
log = logging.getLogger("kvmesh.errors")


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its path in the request and what is wrong with it."""

    field: str
    description: str


class KvmeshError(Exception):
    """A failure with a gRPC code, a machine-readable reason and optional field violations."""

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[FieldViolation] = (),
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.reason = reason or self.code.name
        self.violations = tuple(violations)
        self.retryable = retryable


class InvalidArgument(KvmeshError):
    """The request cannot be served as written."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(KvmeshError):
    """What the request names does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(KvmeshError):
    """What the request makes exists."""

    code = grpc.StatusCode.ALREADY_EXISTS


class ResourceExhausted(KvmeshError):
    """A limit is reached; later may work."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(KvmeshError):
    """The state must change first."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Unavailable(KvmeshError):
    """Nobody can serve this now."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(KvmeshError):
    """Time ran out."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Aborted(KvmeshError):
    """Given up on purpose."""

    code = grpc.StatusCode.ABORTED


class Cancelled(KvmeshError):
    """The caller is gone."""

    code = grpc.StatusCode.CANCELLED


class Internal(KvmeshError):
    """Our fault."""

    code = grpc.StatusCode.INTERNAL


_BY_CODE: dict[grpc.StatusCode, type[KvmeshError]] = {
    error.code: error
    for error in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        ResourceExhausted,
        FailedPrecondition,
        Unavailable,
        DeadlineExceeded,
        Aborted,
        Cancelled,
        Internal,
    )
}


def invalid(field: str, description: str) -> InvalidArgument:
    """An InvalidArgument for one field; the description names the value and the limit."""
    return InvalidArgument(
        f"{field}: {description}",
        reason="INVALID_FIELD",
        violations=[FieldViolation(field, description)],
    )


def to_rpc_status(error: BaseException) -> grpc.Status:
    """The rich status of an exception; unknown ones become INTERNAL with a logged incident id."""
    if not isinstance(error, KvmeshError):
        incident = secrets.token_hex(4)
        log.error("incident %s", incident, exc_info=error)
        error = Internal(f"internal error, incident {incident}", reason="UNEXPECTED")
    proto = status_pb2.Status(
        code=code_pb2.Code.Value(error.code.name), message=str(error)
    )
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    if error.retryable:
        info.metadata["retryable"] = "true"
    _pack(proto, info)
    if error.violations:
        _pack(
            proto,
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=v.field, description=v.description
                    )
                    for v in error.violations
                ]
            ),
        )
    return rpc_status.to_status(proto)


def from_rpc_error(error: grpc.RpcError) -> KvmeshError:
    """The domain error behind a failed call, with its reason and field violations."""
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
    message = str(error.details() if hasattr(error, "details") else error)  # pyright: ignore[reportAttributeAccessIssue]
    kind = _BY_CODE.get(code or grpc.StatusCode.INTERNAL, Internal)
    reason, violations, retryable = "", [], False
    for detail in _details(error):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason, retryable = info.reason, info.metadata.get("retryable") == "true"
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations = [FieldViolation(v.field, v.description) for v in bad.field_violations]
    return kind(message, reason=reason, violations=violations, retryable=retryable)


def _details(error: grpc.RpcError) -> Sequence[any_pb2.Any]:
    if not hasattr(error, "trailing_metadata"):
        return ()
    for key, value in error.trailing_metadata() or ():  # pyright: ignore[reportAttributeAccessIssue]
        if key == "grpc-status-details-bin":
            proto = status_pb2.Status()
            proto.ParseFromString(value)
            return proto.details
    return ()


def _pack(proto: status_pb2.Status, message: object) -> None:
    detail = any_pb2.Any()
    detail.Pack(message)  # pyright: ignore[reportArgumentType]
    proto.details.append(detail)
