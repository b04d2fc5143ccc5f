"""Postroom: an actor-based message router for WhatsApp webhooks. This is the public API."""

from actors.messages import Ack, Envelope, Reject, Reply, Retry, Session, SessionChange
from router.app import NotStored, Router, open_router
from router.config import Config, ConfigError, SenderConfig, ServiceConfig
from router.inbound import inbound

__all__ = [
    "Ack",
    "Config",
    "ConfigError",
    "Envelope",
    "NotStored",
    "Reject",
    "Reply",
    "Retry",
    "Router",
    "SenderConfig",
    "ServiceConfig",
    "Session",
    "SessionChange",
    "inbound",
    "open_router",
]
