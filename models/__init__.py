"""What API and workers agree on: settings, errors, types, tables, registry, store, broker."""
