"""Base layer: errors, shapes, seeds, config, device, log, paths, files."""
