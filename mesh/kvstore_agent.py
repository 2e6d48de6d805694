"""A transfer agent on the wire. Owns the two translations; never checks what an agent says."""

from __future__ import annotations

from kv.path import Transport
from kv.transfer import Agent
from protos import kvstore_pb2

_TO_WIRE = {
    Transport.CMA: kvstore_pb2.TRANSPORT_CMA,
    Transport.CUDA_IPC: kvstore_pb2.TRANSPORT_CUDA_IPC,
    Transport.RDMA: kvstore_pb2.TRANSPORT_RDMA,
}
_FROM_WIRE = {number: transport for transport, number in _TO_WIRE.items()}


def agent_to_wire(agent: Agent) -> kvstore_pb2.Agent:
    """The message that carries an agent."""
    return kvstore_pb2.Agent(
        name=agent.name,
        nixl_version=agent.nixl_version,
        metadata=agent.metadata,
        arena_address=agent.arena_address,
        arena_num_bytes=agent.arena_num_bytes,
        incarnation=agent.incarnation,
        host_id=agent.host_id,
        pid=agent.pid,
        name_address=agent.name_address,
        transports=[_TO_WIRE[transport] for transport in agent.transports],
    )


def agent_from_wire(message: kvstore_pb2.Agent) -> Agent:
    """The agent a message carries, less transports that are unknown here."""
    return Agent(
        name=message.name,
        nixl_version=message.nixl_version,
        metadata=message.metadata,
        arena_address=message.arena_address,
        arena_num_bytes=message.arena_num_bytes,
        incarnation=message.incarnation,
        host_id=message.host_id,
        pid=message.pid,
        name_address=message.name_address,
        transports=tuple(_FROM_WIRE[n] for n in message.transports if n in _FROM_WIRE),
    )
