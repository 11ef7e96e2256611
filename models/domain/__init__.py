"""Domain types: frozen pydantic models and enumerations, free of any framework."""
