"""What the API and the workers agree on: settings, errors, domain types, tables, registry, storage, broker."""
