"""Send webhooks in a test, one after another."""

from skyloom.serve.queue.webhook_delivery import WebhookSender


def deliver_due(database, post) -> int:
    """Send all due deliveries; return their number."""
    sender = WebhookSender(database, post, total=1)
    sent = 0
    while sender.send_due():
        sent += 1
        assert sender.wait_until_idle(60)
    return sent
