"""One module for each family of formats: from bytes to records, in flat memory."""
