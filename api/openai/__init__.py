"""The OpenAI contract: files, fine-tuning jobs, models, chat completions."""
