"""What may be made, and how it is marked: watermark, content credentials, registry, moderation."""
