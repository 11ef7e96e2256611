"""What serves: an engine, the tiers of adapters in front of it, and the server around both."""
