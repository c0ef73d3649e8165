"""Prefect flows and the command line: order, retries and schedules, no arithmetic."""
