"""The ground floor: shapes, errors, seeds, configuration. No networks, no media, no sockets."""
