"""Moderation, watermark, C2PA content credentials, provenance registry, verification."""
