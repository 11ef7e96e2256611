"""Running the service: workers, usage."""
