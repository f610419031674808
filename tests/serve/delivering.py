"""Deliver webhooks in a test, one after another."""

from skyloom.serve.queue.webhook_delivery import Courier


def deliver_due(database, post) -> int:
    """Send all deliveries that are due; return how many."""
    courier, sent = Courier(database, post, total=1), 0
    while courier.start_due():
        sent += 1
        assert courier.settle(60)
    return sent
