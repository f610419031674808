"""The diorama: procedural videos with captions that are true by construction."""
