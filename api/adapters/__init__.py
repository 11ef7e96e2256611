"""Fine-tuned models over the API, beyond OpenAI's model objects."""
