"""Prompts of held-out scenes, and reports that compare generated videos with real renders."""
