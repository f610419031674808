"""Models from model hubs: the catalogue, downloads, reuse of files on disk, added models."""
