"""A simulated population of phones that sends signed webhooks as Meta would, and the ledger that judges.

Imports nothing of the router: the judge shares no code with the judged. The builders of bodies are in
`payloads`.
"""

from router.simulator import payloads
from router.simulator.client import Answer, NotAnswered, WebhookClient
from router.simulator.deliveries import Delivery, Manner, SentItem
from router.simulator.faults import Faults
from router.simulator.graph import GraphEndpoint, GraphFaults, Refused, Taken
from router.simulator.ledger import Ledger, Report
from router.simulator.phones import Population
from router.simulator.signing import signature
from router.simulator.traffic import Client, run_traffic

__all__ = [
    "Answer",
    "Client",
    "Delivery",
    "Faults",
    "GraphEndpoint",
    "GraphFaults",
    "Ledger",
    "Manner",
    "NotAnswered",
    "Population",
    "Refused",
    "Report",
    "SentItem",
    "Taken",
    "WebhookClient",
    "payloads",
    "run_traffic",
    "signature",
]
