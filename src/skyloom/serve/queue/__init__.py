"""Durable jobs and everything else in the database."""
