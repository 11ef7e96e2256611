"""API keys over the API."""
