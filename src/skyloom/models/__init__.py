"""Networks and their weights; no sampling, no training, no sockets."""
