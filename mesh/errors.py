"""Domain errors of the mesh and the one table between them and gRPC status.

Owns the mapping in both directions, with google.rpc.ErrorInfo and BadRequest details. A client's
mistake is never logged; an unknown exception is logged once, with the incident id its caller sees.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "kvmesh.dev"
# Status travels in HTTP/2 trailers, which peers cut off at 8 KiB: a longer one would be lost.
MAX_MESSAGE_NUM_BYTES = 1024
MAX_DETAILS_NUM_BYTES = 2048
_DETAILS_KEY = "grpc-status-details-bin"
log = logging.getLogger("kvmesh.errors")


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its path in the request and what is wrong with it."""

    field: str
    description: str


class KvmeshError(Exception):
    """A failure with a gRPC code, a machine-readable reason and optional field violations.

    `reason` is UPPER_SNAKE_CASE and defaults to the code's name. `retryable` says that the same
    request may succeed elsewhere or later.
    """

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


class Unimplemented(KvmeshError):
    """The peer has no such call."""

    code = grpc.StatusCode.UNIMPLEMENTED


class PermissionDenied(KvmeshError):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(KvmeshError):
    """The caller did not say who it is."""

    code = grpc.StatusCode.UNAUTHENTICATED


class Internal(KvmeshError):
    """Our fault."""

    code = grpc.StatusCode.INTERNAL


_BY_CODE: dict[grpc.StatusCode, type[KvmeshError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument, NotFound, AlreadyExists, ResourceExhausted, FailedPrecondition,
        Unavailable, DeadlineExceeded, Aborted, Cancelled, Unimplemented, PermissionDenied,
        Unauthenticated, Internal,
    )
}  # fmt: skip


def invalid(field: str, description: str) -> InvalidArgument:
    """An InvalidArgument for one field; the description names the value and the limit."""
    return InvalidArgument(
        f"{field}: {description}",
        reason="INVALID_FIELD",
        violations=[FieldViolation(field, description)],
    )


def domain_error(error: BaseException) -> KvmeshError:
    """The domain error a handler's exception stands for.

    A peer's failure keeps its code, but its CANCELLED is not ours: that becomes Unavailable.
    A group of such (asyncio.TaskGroup raises them) stands for its first. Anything unknown becomes
    Internal with an incident id, logged here with its traceback.
    """
    if isinstance(error, KvmeshError):
        return error
    if isinstance(error, grpc.RpcError):
        peer = from_rpc_error(error)
        if isinstance(peer, Cancelled):
            return Unavailable(f"a peer gave up: {peer}", reason="PEER_CANCELLED", retryable=True)
        return peer
    if isinstance(error, ExceptionGroup):
        known, unknown = error.split((KvmeshError, grpc.RpcError))
        if known is not None and unknown is None:
            return domain_error(known.exceptions[0])
    if isinstance(error, asyncio.CancelledError):
        return Aborted("the work was stopped on the server", reason="STOPPED", retryable=True)
    incident = secrets.token_hex(4)
    log.error("incident %s: %r", incident, error, exc_info=error)
    return Internal(f"internal error, incident {incident}", reason="UNEXPECTED")


def to_rpc_status(error: BaseException) -> grpc.Status:
    """The rich status of an exception, small enough for trailers; see `domain_error`."""
    known = domain_error(error)
    proto = status_pb2.Status(
        code=code_pb2.Code.Value(known.code.name), message=_cut(str(known), MAX_MESSAGE_NUM_BYTES)
    )
    info = error_details_pb2.ErrorInfo(reason=_cut(known.reason, 64), domain=DOMAIN)
    if known.retryable:
        info.metadata["retryable"] = "true"
    _pack(proto, info)
    if known.violations:
        _pack(proto, _bad_request(known.violations))
    return rpc_status.to_status(proto)


def from_rpc_error(error: grpc.RpcError) -> KvmeshError:
    """The domain error behind a failed call (sync or asyncio), with reason and field violations.

    Without our details (transport trouble, other servers) the reason is the code's name, and only
    UNAVAILABLE is retryable.
    """
    code = error.code() if callable(getattr(error, "code", None)) else None  # pyright: ignore
    text = error.details() if callable(getattr(error, "details", None)) else str(error)  # pyright: ignore
    kind = _BY_CODE.get(code or grpc.StatusCode.INTERNAL, Internal)
    reason = code.name if code is not None else ""
    violations: list[FieldViolation] = []
    retryable = kind is Unavailable
    for detail in _details(error):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason, retryable = info.reason, info.metadata.get("retryable", "") == "true"
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations = [FieldViolation(v.field, v.description) for v in bad.field_violations]
    return kind(str(text or reason), reason=reason, violations=violations, retryable=retryable)


def _details(error: grpc.RpcError) -> Sequence[any_pb2.Any]:
    read = getattr(error, "trailing_metadata", None)
    for key, value in (read() if read is not None else None) or ():
        if key == _DETAILS_KEY:
            proto = status_pb2.Status()
            try:
                proto.ParseFromString(value)
            except message.DecodeError:
                log.warning("a peer's status details are not google.rpc.Status; ignored")
                return ()
            return proto.details
    return ()


def _bad_request(violations: Sequence[FieldViolation]) -> error_details_pb2.BadRequest:
    """As many violations as fit."""
    bad, room = error_details_pb2.BadRequest(), MAX_DETAILS_NUM_BYTES
    for violation in violations:
        field, text = _cut(violation.field, 256), _cut(violation.description, 1024)
        room -= len(field.encode()) + len(text.encode()) + 8
        if room < 0:
            break
        bad.field_violations.add(field=field, description=text)
    return bad


def _cut(text: str, num_bytes: int) -> str:
    data = text.encode("utf-8", errors="replace")
    if len(data) <= num_bytes:
        return data.decode()
    return data[: num_bytes - 3].decode(errors="ignore") + "..."


def _pack(proto: status_pb2.Status, detail: message.Message) -> None:
    proto.details.add().Pack(detail)
